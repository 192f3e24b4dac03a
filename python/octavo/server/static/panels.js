// The panels beside the chat: which are open, and how many fit.

import { $, memory } from "./dom.js";

const PANELS = ["conversations", "settings", "engine"];
const ROOM_FOR_BOTH = 1500; // pixels, for settings and engine beside each other
const NARROW = 820; // pixels; below, a panel covers the chat

export const isNarrow = () => window.innerWidth <= NARROW;

/** Those that cannot be open together with a panel. */
function rivals(id) {
  if (isNarrow()) return PANELS.filter((other) => other !== id);
  if (id === "conversations" || window.innerWidth >= ROOM_FOR_BOTH) return [];
  return [id === "engine" ? "settings" : "engine"];
}

function set(id, open) {
  $(id).hidden = !open;
  $(`show-${id}`).setAttribute("aria-expanded", open);
}

export function showPanel(id, open) {
  if (open) for (const other of rivals(id)) set(other, false);
  set(id, open);
  // Opened again where something else was closed for want of room, it is open next time.
  if (!isNarrow()) for (const each of PANELS) memory.set(`panel-${each}`, $(each).hidden ? "closed" : "open");
}

export function togglePanel(id) {
  const open = $(id).hidden;
  showPanel(id, open);
  if (open) $(id).querySelector("input, textarea, button, canvas")?.focus({ preventScroll: true });
  else $(`show-${id}`).focus();
}

/** Close a panel that covers the chat of a narrow screen; whether there was one. */
export function closeCover() {
  const cover = isNarrow() && PANELS.find((id) => !$(id).hidden);
  if (cover) togglePanel(cover);
  return Boolean(cover);
}

for (const id of PANELS) {
  const remembered = memory.get(`panel-${id}`) ?? (id === "settings" ? "closed" : "open");
  set(id, remembered === "open" && !isNarrow());
  $(`show-${id}`).addEventListener("click", () => showPanel(id, $(id).hidden));
}
if (!$("settings").hidden && window.innerWidth < ROOM_FOR_BOTH) set("engine", false);
