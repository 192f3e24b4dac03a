// Asking and answering: sends messages, writes answers down as they come, stops, tries again.

import { stream } from "./api.js";
import * as connection from "./connection.js";
import { $, memory, toast } from "./dom.js";
import * as view from "./messages.js";
import { thoughtOf } from "./render.js";
import { follow, hold } from "./scroll.js";
import { requestFields } from "./settings.js";
import * as state from "./state.js";
import { addNode, branch, showBranch, siblings } from "./tree.js";

const prompt = $("prompt");
const SAVE_EVERY = 1000; // milliseconds, while an answer is being written
const writing = new Map(); // conversation id -> {node, controller}; several may be written at a time

const isWriting = (node) => [...writing.values()].some((one) => one.node === node);
export const writes = (conversation) => writing.has(conversation.id);

const actions = { isWriting, edit, again, choose };

function setBusy() {
  const busy = writes(state.current);
  if (busy === $("send").hidden) return;
  const hadFocus = document.activeElement === $("stop-button") || document.activeElement === $("send");
  $("send").hidden = busy;
  $("stop-button").hidden = !busy;
  $("messages").setAttribute("aria-busy", busy);
  if (hadFocus) prompt.focus(); // what had it is hidden now
}

function show(toEnd = true) {
  view.show(state.current, actions);
  setBusy();
  if (toEnd) follow(true);
}

/** What a request to answer the message with the id `last` holds. */
function requestOf(conversation, last) {
  const turns = branch(conversation, last).filter((node) => node.content);
  const messages = turns.map(({ role, content }) => {
    const found = role === "assistant" && thoughtOf(content);
    return found ? { role, content: found.rest.trimStart(), reasoning: found.thought } : { role, content };
  });
  const system = (conversation.settings.system ?? "").trim();
  if (system) messages.unshift({ role: "system", content: system });
  // Counts come with every piece, so that an answer that is stopped has them too.
  const options = { include_usage: true, continuous_usage_stats: true };
  return { messages, stream: true, stream_options: options, ...requestFields(conversation) };
}

/** Read an answer into its node; `tell` is called after each piece. */
async function read(node, request, signal, tell) {
  const { facts } = node;
  const started = performance.now();
  let first = 0;
  let thinks = false;
  for await (const event of stream("/v1/chat/completions", request, signal)) {
    facts.id = event.id;
    facts.model = event.model;
    if (event.usage) {
      facts.read = event.usage.prompt_tokens;
      facts.cached = event.usage.prompt_tokens_details?.cached_tokens ?? facts.cached ?? 0;
      facts.written = event.usage.completion_tokens;
    }
    const choice = event.choices[0];
    if (!choice) continue;
    const { content, reasoning } = choice.delta;
    if (content || reasoning) {
      if (!first) {
        first = performance.now();
        facts.first = (first - started) / 1000;
      }
      // Kept as one text, in which what was thought stands first, between tags.
      if (reasoning) node.content += (thinks ? "" : "<think>") + reasoning;
      if (content) node.content += (thinks ? "</think>\n\n" : "") + content;
      thinks = Boolean(reasoning) || (thinks && !content);
      facts.seconds = (performance.now() - first) / 1000;
      tell();
    }
    facts.reason = choice.finish_reason ?? facts.reason;
  }
}

async function write(conversation, node) {
  const request = requestOf(conversation, node.parent);
  const controller = new AbortController();
  node.facts = { reason: "writing" };
  writing.set(conversation.id, { node, controller });
  if (conversation === state.current) show();
  state.save(conversation);
  const isDeleted = () => state.isNew(conversation);
  let frame = 0;
  let saved = performance.now();
  const drawSoon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (conversation === state.current) view.grow(node);
    });
    if (performance.now() - saved > SAVE_EVERY && !isDeleted()) {
      saved = performance.now();
      state.saveProgress(conversation);
    }
  };
  try {
    await read(node, request, controller.signal, drawSoon);
  } catch (error) {
    if (error.name === "AbortError") {
      node.facts.reason = "stopped";
    } else {
      node.facts.reason = connection.note(error) ? "gone" : "error";
      node.facts.error = sentence(error.message);
    }
  }
  cancelAnimationFrame(frame);
  writing.delete(conversation.id);
  conversation.updated = Date.now();
  if (conversation === state.current) {
    view.refresh(conversation, node, actions);
    setBusy();
  }
  if (!isDeleted()) state.save(conversation);
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

/** Whether nothing is being written in a conversation; says so where something is. */
function isFree(conversation) {
  if (writes(conversation)) toast("One answer at a time: wait for this one, or stop it.");
  return !writes(conversation);
}

/** Whether a message can be sent now; without a server, the line above the message box says so. */
const canSend = (conversation) => connection.state === "ready" && isFree(conversation);

export function send(text) {
  const conversation = state.current;
  const content = text.trim();
  if (!content || !canSend(conversation)) return;
  const asked = addNode(conversation, conversation.leaf, "user", content);
  setDraft("");
  write(conversation, addNode(conversation, asked.id, "assistant", ""));
}

function edit(node, content) {
  const conversation = state.current;
  if (node.role === "user" ? !canSend(conversation) : !isFree(conversation)) return;
  const changed = addNode(conversation, node.parent, node.role, content);
  if (node.role === "user") {
    write(conversation, addNode(conversation, changed.id, "assistant", ""));
  } else {
    hold(() => show(false));
    state.save(conversation);
  }
  prompt.focus();
}

/** Another answer beside this one; in its place where it has no text. */
function again(node) {
  const conversation = state.current;
  if (!canSend(conversation)) return;
  const answer = node.content ? addNode(conversation, node.parent, "assistant", "") : node;
  write(conversation, answer);
  prompt.focus();
}

function choose(node) {
  const conversation = state.current;
  if (!isFree(conversation)) return;
  const all = siblings(conversation, node);
  const shown = all.find((one) => branch(conversation).includes(one));
  showBranch(conversation, node);
  hold(() => show(false));
  view.focusTurn(node, all.indexOf(node) > all.indexOf(shown) ? 1 : -1);
  state.save(conversation);
}

export function stop(conversation = state.current) {
  writing.get(conversation.id)?.controller.abort();
}

// ---- the message box ----

const draftKey = () => (state.isNew(state.current) ? "draft-new" : `draft-${state.current.id}`);

function setDraft(text) {
  prompt.value = text;
  memory.set(draftKey(), text);
  view.fit(prompt);
}

prompt.addEventListener("input", () => setDraft(prompt.value));
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(prompt.value);
  }
  if (event.key === "ArrowUp" && !prompt.value) {
    event.preventDefault();
    view.press(view.lastAskedId(), ".edit");
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
$("stop-button").addEventListener("click", () => stop());
$("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) send(event.target.textContent);
});

let shown = null;
state.events.addEventListener("current", () => {
  const isOther = shown !== state.current;
  if (!isOther && document.querySelector(".editing")) return; // another tab wrote; not now
  shown = state.current;
  if (!isOther) return hold(() => show(false));
  setDraft(memory.get(draftKey()) ?? "");
  show();
  document.title = state.current.title ? `${state.current.title} · octavo` : "octavo";
});
