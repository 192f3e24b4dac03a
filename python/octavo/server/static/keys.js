// Everything the page does is done with the keyboard too; "?" lists the keys.

import { stop } from "./chat.js";
import { $, element } from "./dom.js";
import { focusedId, press, walk } from "./messages.js";
import { closeCover, showPanel, togglePanel } from "./panels.js";
import * as state from "./state.js";

/** [how it is shown, what it does, its code, what runs]; with Alt, anywhere. */
const ALT = [
  ["N", "a new chat", "KeyN", () => newChat()],
  ["C", "conversations", "KeyC", () => togglePanel("conversations")],
  ["K", "search in conversations", "KeyK", () => searchConversations()],
  ["S", "settings", "KeyS", () => togglePanel("settings")],
  ["E", "the engine", "KeyE", () => togglePanel("engine")],
  ["T", "light or dark", "KeyT", () => window.switchTheme()],
  ["↑", "the message before", "ArrowUp", () => walk(-1)],
  ["↓", "the message after", "ArrowDown", () => walk(1)],
];
/** [key, what it does, what runs]; where nothing is being typed; letters only in a message. */
const PLAIN = [
  ["/", "to the message box", () => $("prompt").focus()],
  ["?", "these keys", () => $("help").showModal()],
  ["e", "edit the message in focus", () => press(focusedId(), ".edit")],
  ["[", "its version before", () => press(focusedId(), '[data-turn="-1"]')],
  ["]", "its version after", () => press(focusedId(), '[data-turn="1"]')],
];
const IN_PLACES = [
  ["Enter", "send; Shift Enter breaks the line"],
  ["Esc", "stop the answer"],
  ["↑", "edit your last message, from the empty message box"],
  ["F2", "rename the conversation in focus"],
  ["Del", "delete it, with a way back"],
];

export function newChat() {
  state.startNew();
  $("prompt").focus();
}

function searchConversations() {
  showPanel("conversations", true);
  $("search").focus();
}

const keys = [
  ...IN_PLACES,
  ...PLAIN.map(([key, does]) => [key, does]),
  ...ALT.map(([key, does]) => [`Alt ${key}`, does]),
];
for (const [key, does] of keys) {
  const names = key.split(" ").flatMap((name, i) => (i ? [" ", element("kbd", {}, name)] : [element("kbd", {}, name)]));
  $("key-list").append(element("dt", {}, ...names), element("dd", {}, does));
}

const isTyping = () => document.activeElement?.matches("input:not([type=range]), textarea, select") ?? false;

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const open = document.querySelector(":popover-open");
  if (event.key === "Escape" && !open && !closeCover()) stop();
  const plain = PLAIN.find(([key]) => key === event.key);
  if (plain && !isTyping() && !event.altKey && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    plain[2]();
  }
  const withAlt = ALT.find(([, , code]) => code === event.code);
  if (withAlt && event.altKey && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    withAlt[3]();
  }
});
