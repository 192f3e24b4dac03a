// The list of conversations: search, open, rename, delete.

import { stop, writes } from "./chat.js";
import { $, button, element, iconButton, toast } from "./dom.js";
import { isNarrow, showPanel } from "./panels.js";
import * as state from "./state.js";
import * as store from "./store.js";
import { matches } from "./tree.js";

const list = $("conversation-list");
const search = $("search");

/** "today", "yesterday", a weekday, or a date. */
function dayOf(time) {
  const start = new Date().setHours(0, 0, 0, 0);
  if (time >= start) return "Today";
  const days = Math.ceil((start - time) / 86_400_000);
  if (days === 1) return "Yesterday";
  if (days < 7) return new Date(time).toLocaleDateString("en", { weekday: "long" });
  return new Date(time).toLocaleDateString("en", { day: "numeric", month: "long", year: "numeric" });
}

function itemOf(conversation) {
  const isCurrent = conversation === state.current;
  const item = element("li", { className: isCurrent ? "item current" : "item" });
  item.dataset.id = conversation.id;
  const open = button(conversation.title || "Untitled", () => openItem(conversation), {
    className: "open",
    tabIndex: -1,
    title: conversation.title,
  });
  if (isCurrent) open.setAttribute("aria-current", "true");
  if (writes(conversation)) item.classList.add("busy");
  item.append(
    open,
    iconButton("pencil", "Rename (F2)", () => rename(conversation), { className: "act", tabIndex: isCurrent ? 0 : -1 }),
    iconButton("bin", "Delete (Del)", () => remove(conversation), { className: "act", tabIndex: isCurrent ? 0 : -1 }),
  );
  return item;
}

function openItem(conversation) {
  state.open(conversation.id);
  if (isNarrow()) showPanel("conversations", false);
  $("prompt").focus();
}

const openButton = (id) => list.querySelector(`[data-id="${id}"] .open`);

function show() {
  if (list.querySelector("input")) return; // a title is being written
  const focused = document.activeElement?.closest(".item")?.dataset.id;
  const found = state.list().filter((conversation) => matches(conversation, search.value));
  let day = null;
  const lines = found.flatMap((conversation) => {
    const before = day;
    day = dayOf(conversation.updated);
    const item = itemOf(conversation);
    return day === before ? [item] : [element("li", { className: "day", role: "presentation" }, day), item];
  });
  list.replaceChildren(...lines);
  // One of them is reached with Tab, the others from there with the arrows.
  const first = list.querySelector(".current .open") ?? list.querySelector(".open");
  if (first) first.tabIndex = 0;
  if (focused) openButton(focused)?.focus();
  $("none-found").hidden = found.length > 0;
  $("none-found").textContent = search.value ? "No conversation has these words." : "None yet.";
  const { title } = state.current;
  document.title = title ? `${title} · octavo` : "octavo";
}

function rename(conversation) {
  const open = openButton(conversation.id);
  const field = element("input", { value: conversation.title, ariaLabel: "Title", className: "open" });
  let isDone = false;
  const end = (keeps) => {
    if (isDone) return; // leaving the field is another end of it
    isDone = true;
    const title = field.value.trim().slice(0, 200);
    const hadFocus = document.activeElement === field;
    field.remove();
    if (keeps && title) {
      conversation.title = title;
      state.save(conversation);
    }
    show();
    if (hadFocus) openButton(conversation.id)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" || event.key === "Escape") {
      event.preventDefault();
      end(event.key === "Enter");
    }
  });
  field.addEventListener("blur", () => end(true));
  open.replaceWith(field);
  field.select();
}

function remove(conversation) {
  const items = [...list.querySelectorAll(".item")];
  const place = items.findIndex((item) => item.dataset.id === conversation.id);
  const next = items[place + 1] ?? items[place - 1];
  stop(conversation);
  state.remove(conversation);
  (openButton(next?.dataset.id) ?? search).focus();
  toast(`Deleted “${conversation.title}”.`, {
    label: "Undo",
    run: async () => {
      await state.add([conversation]);
      state.open(conversation.id);
    },
  });
}

list.addEventListener("keydown", (event) => {
  const item = event.target.closest(".item");
  const conversation = item && state.find(item.dataset.id);
  if (!conversation) return;
  const opens = [...list.querySelectorAll(".open")];
  const place = opens.indexOf(item.querySelector(".open"));
  const moves = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: opens.length - 1 };
  if (event.key in moves) {
    event.preventDefault();
    if (moves[event.key] < 0) search.focus();
    else opens[moves[event.key]]?.focus();
  } else if (event.key === "F2") {
    rename(conversation);
  } else if (event.key === "Delete") {
    remove(conversation);
  }
});
search.addEventListener("input", show);
search.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "Enter") {
    event.preventDefault();
    list.querySelector(".open")?.focus();
  } else if (event.key === "Escape" && search.value) {
    event.stopPropagation();
    search.value = "";
    show();
  }
});
state.events.addEventListener("list", show);
store.isKept().then((kept) => {
  $("not-kept").hidden = kept;
});
