// The messages of the branch that is shown: their elements, what they took, and their buttons.

import { $, button, copyButton, element, iconButton } from "./dom.js";
import { explain } from "./explain.js";
import { draw } from "./render.js";
import { follow } from "./scroll.js";
import { branch, siblings } from "./tree.js";

const messages = $("messages");
const ENDINGS = {
  length: "cut off at its longest",
  stopped: "stopped by you",
  timeout: "out of time",
  writing: "the page was left before its end",
};

const elementOf = (node) => messages.querySelector(`[data-id="${node.id}"]`);

function factsOf(node) {
  const { read, cached, written, first, seconds, reason, model } = node.facts ?? {};
  const facts = [];
  if (read) facts.push(`${read} tokens read${cached ? `, ${cached} of them cached` : ""}`);
  if (written) facts.push(`${written} written`);
  if (written > 1 && seconds > 0) facts.push(`${((written - 1) / seconds).toFixed(1)} a second`);
  if (first) facts.push(`first after ${first.toFixed(2)} s`);
  if (ENDINGS[reason]) facts.push(ENDINGS[reason]);
  if (model && !$("model-choice").hidden) facts.push(model);
  return facts;
}

/** ‹ 2 / 3 ›: the other versions of a message. */
function versions(conversation, node, actions) {
  const all = siblings(conversation, node);
  if (all.length < 2) return [];
  const place = all.indexOf(node);
  const turn = (step, name, label) =>
    iconButton(name, label, () => actions.choose(all[place + step]), {
      disabled: !all[place + step],
      className: "turn",
      "data-turn": String(step),
    });
  const group = element("span", { className: "versions", role: "group", ariaLabel: "Versions" });
  group.append(turn(-1, "left", "The version before"), `${place + 1} / ${all.length}`, turn(1, "right", "The version after"));
  return [group];
}

function foot(conversation, node, actions) {
  const isAnswer = node.role === "assistant";
  const made = element("div", { className: isAnswer ? "facts" : "facts quiet-facts" });
  for (const fact of isAnswer ? factsOf(node) : []) made.append(element("span", {}, fact));
  made.append(...versions(conversation, node, actions));
  made.append(copyButton(() => node.content, "Copy"));
  made.append(button("Edit", () => edit(node, actions), { className: "edit" }));
  if (!isAnswer) return made;
  made.append(button("Again", () => actions.again(node)));
  if (node.facts?.id) made.append(button("Where did the time go?", () => explain(node.facts.id)));
  return made;
}

/** Change a message in its place; what was there stays as another version. */
function edit(node, actions) {
  const message = elementOf(node);
  const isAnswer = node.role === "assistant";
  const area = element("textarea", { value: node.content, ariaLabel: isAnswer ? "Answer" : "Message" });
  const form = element("form", { className: "editing" }, area);
  const close = () => {
    form.remove();
    message.classList.remove("edited");
    message.querySelector(".edit")?.focus();
  };
  const keep = () => {
    if (!area.value.trim() || area.value === node.content) close();
    else actions.edit(node, area.value);
  };
  const row = element("div", { className: "editing-foot" });
  row.append(element("span", { className: "soft" }, "What is there now stays as another version."));
  row.append(button("Cancel", close, { className: "quiet" }));
  row.append(element("button", { className: "primary" }, isAnswer ? "Keep" : "Send"));
  form.append(row);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    keep();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      keep();
    }
  });
  message.classList.add("edited");
  message.prepend(form);
  fit(area);
  area.addEventListener("input", () => fit(area));
  area.focus();
}

/** Make a text area as high as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function fill(message, conversation, node, actions) {
  const body = message.querySelector(".text");
  if (node.role === "user") body.textContent = node.content;
  else draw(body, node.content);
  message.querySelector(".error")?.remove();
  if (node.facts?.error) {
    message.append(element("p", { className: "error", role: "alert" }, node.facts.error));
  }
  message.querySelector(".facts")?.remove();
  if (!actions.isWriting(node)) message.append(foot(conversation, node, actions));
  message.classList.toggle("writing", actions.isWriting(node));
}

function newMessage(node) {
  const label = node.role === "user" ? "You" : "Answer";
  const message = element("article", { className: `message ${node.role}`, tabIndex: -1, ariaLabel: label });
  message.dataset.id = node.id;
  message.append(element("div", { className: "text" }));
  return message;
}

/** Show a conversation's branch, from its first message on. */
export function show(conversation, actions) {
  const nodes = branch(conversation);
  const made = nodes.map((node) => {
    const message = newMessage(node);
    fill(message, conversation, node, actions);
    return message;
  });
  messages.querySelectorAll(".message").forEach((message) => message.remove());
  messages.append(...made);
  $("welcome").hidden = nodes.length > 0;
}

/** Draw a message again of which only the text has grown. */
export function grow(node) {
  const body = elementOf(node)?.querySelector(".text");
  if (body) draw(body, node.content);
  follow();
}

/** Draw a message whole: it has ended, or has begun again. */
export function refresh(conversation, node, actions) {
  const message = elementOf(node);
  if (message) fill(message, conversation, node, actions);
  follow();
}

/** Put the focus where it was before the messages were made anew. */
export function focusTurn(node, step) {
  const turn = elementOf(node)?.querySelector(`[data-turn="${step}"]`);
  const other = elementOf(node)?.querySelector(".turn:not(:disabled)");
  (turn?.disabled ? other : turn)?.focus({ preventScroll: true });
}

/** Move the focus from message to message: step is 1 or -1. */
export function walk(step) {
  const all = [...messages.querySelectorAll(".message")];
  const place = all.findIndex((message) => message.contains(document.activeElement));
  const next = place < 0 ? all.at(step < 0 ? -1 : 0) : all[place + step];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

/** The id of the message that has the focus, or null. */
export const focusedId = () => document.activeElement?.closest(".message")?.dataset.id ?? null;

/** The id of the reader's last message, or null. */
export const lastAskedId = () => [...messages.querySelectorAll(".message.user")].at(-1)?.dataset.id ?? null;

/** Press a button of a message, as far as it has it. */
export function press(id, selector) {
  messages.querySelector(`[data-id="${id}"] ${selector}`)?.click();
}

