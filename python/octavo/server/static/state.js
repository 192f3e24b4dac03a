// Which conversations there are, and which one is shown. Other files listen to `events`:
//   "list"     the conversations, their titles or their order have changed
//   "current"  another conversation, or another branch of it, is to be shown

import { memory } from "./dom.js";
import * as store from "./store.js";
import { newConversation } from "./tree.js";

export const events = new EventTarget();
const conversations = new Map(); // id -> conversation; a new one comes in with its first message
const otherTabs = new BroadcastChannel("octavo-conversations");
export let current = newConversation();

const tell = (name) => events.dispatchEvent(new Event(name));

/** All conversations, the last used first. */
export function list() {
  return [...conversations.values()].sort((a, b) => b.updated - a.updated);
}

export const find = (id) => conversations.get(id);
export const isNew = (conversation) => !conversations.has(conversation.id);

// Settings of a chat that has no message yet lie apart, so that they outlive a reload.
const defaultSettings = () => memory.read("settings-for-new", {});
const startedSettings = () => memory.read("settings-started", null);

export function keepSettingsForNew(settings) {
  memory.set("settings-for-new", JSON.stringify(settings));
}

/** Write a conversation down; one without messages only remembers its settings. */
export async function save(conversation) {
  if (!Object.keys(conversation.nodes).length) {
    memory.set("settings-started", JSON.stringify({ settings: conversation.settings, model: conversation.model }));
    return;
  }
  if (isNew(conversation)) {
    memory.set("settings-started", null);
    conversations.set(conversation.id, conversation);
    if (conversation === current) history.replaceState(null, "", `#${conversation.id}`);
  }
  tell("list");
  await store.write(conversation);
  otherTabs.postMessage({ id: conversation.id });
}

/** Write down an answer that is still growing: lists need not know. */
export const saveProgress = (conversation) => store.write(conversation);

function show(conversation, address) {
  current = conversation;
  if (location.hash.slice(1) !== address) history.pushState(null, "", address ? `#${address}` : location.pathname);
  tell("current");
  tell("list");
}

export function open(id) {
  const conversation = conversations.get(id);
  if (conversation) show(conversation, id);
}

export function startNew() {
  memory.set("settings-started", null);
  show(newConversation(defaultSettings()), "");
}

export async function remove(conversation) {
  conversations.delete(conversation.id);
  memory.set(`draft-${conversation.id}`, null);
  if (conversation === current) startNew();
  else tell("list");
  await store.remove(conversation.id);
  otherTabs.postMessage({ id: conversation.id });
}

/** Take in conversations of a file; those that are here under the same id are added to. */
export async function add(found) {
  for (const conversation of found) {
    const here = conversations.get(conversation.id);
    const merged = here ? { ...conversation, nodes: { ...conversation.nodes, ...here.nodes } } : conversation;
    if (here) Object.assign(here, { nodes: merged.nodes });
    else conversations.set(merged.id, merged);
    await store.write(here ?? merged);
    otherTabs.postMessage({ id: merged.id });
  }
  tell("list");
}

function showAddress() {
  const found = conversations.get(location.hash.slice(1));
  if (found === current) return;
  if (found) show(found, found.id);
  else if (!isNew(current)) startNew();
}

otherTabs.addEventListener("message", async ({ data }) => {
  const stored = await store.read(data.id);
  const here = conversations.get(data.id);
  if (!stored) conversations.delete(data.id);
  else if (!here) conversations.set(data.id, stored);
  // What this tab shows stays: its branch, and an answer that is being written here.
  else Object.assign(here, { title: stored.title, updated: stored.updated, nodes: { ...stored.nodes, ...here.nodes } });
  if (!stored && here === current) startNew();
  else if (here === current) tell("current");
  tell("list");
});

/** Read what is kept, and show what the page's address names. */
export async function load() {
  for (const conversation of await store.readAll()) conversations.set(conversation.id, conversation);
  const found = conversations.get(location.hash.slice(1));
  const started = startedSettings();
  const settings = started?.settings ?? defaultSettings();
  show(found ?? newConversation(settings, started?.model ?? null), found?.id ?? "");
  window.addEventListener("popstate", showAddress);
  window.addEventListener("hashchange", showAddress);
}
