// Panels, theme and keys; the chat and the live view look after themselves.

import { newChat, stop } from "./chat.js";
import "./engine.js";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

// ---- light and dark: as the system has it, until somebody says otherwise ----

const system = window.matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) {
  root.dataset.theme = theme;
  document.dispatchEvent(new Event("themechange"));
}
setTheme(localStorage.getItem("octavo-theme") ?? (system.matches ? "dark" : "light"));
system.addEventListener("change", () => {
  if (!localStorage.getItem("octavo-theme")) setTheme(system.matches ? "dark" : "light");
});
function switchTheme() {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("octavo-theme", theme);
  setTheme(theme);
}
$("theme").addEventListener("click", switchTheme);

// ---- panels ----

function toggle(button, panel, open = panel.hidden) {
  panel.hidden = !open;
  button.setAttribute("aria-expanded", open);
  localStorage.setItem(`octavo-${panel.id}`, open ? "open" : "closed");
}
for (const id of ["settings", "engine"]) {
  const button = $(`show-${id}`);
  const panel = $(id);
  const remembered = localStorage.getItem(`octavo-${id}`);
  const fits = window.innerWidth > 820;
  if (remembered) toggle(button, panel, remembered === "open" && fits);
  else if (!fits) toggle(button, panel, false);
  button.addEventListener("click", () => toggle(button, panel));
}

// ---- settings ----

const form = $("sampling");
const remembered = JSON.parse(localStorage.getItem("octavo-sampling") ?? "{}");
const fields = [...form.elements].filter((field) => field.id && field.type !== "password");
for (const field of fields) {
  if (field.id in remembered) field.value = remembered[field.id];
}
function showValues() {
  for (const output of form.querySelectorAll("output")) output.textContent = $(output.htmlFor[0]).value;
  const values = Object.fromEntries(fields.map((field) => [field.id, field.value]));
  localStorage.setItem("octavo-sampling", JSON.stringify(values));
}
form.addEventListener("input", showValues);
form.addEventListener("reset", () => setTimeout(showValues));
form.addEventListener("submit", (event) => event.preventDefault());
showValues();

// ---- keys ----

$("new-chat").addEventListener("click", newChat);
document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
  if (event.key === "Escape" && !$("explanation").open) stop();
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    $("prompt").focus();
  }
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const actions = {
    KeyN: newChat,
    KeyS: () => $("show-settings").click(),
    KeyE: () => $("show-engine").click(),
    KeyT: switchTheme,
  };
  if (actions[event.code]) {
    event.preventDefault();
    actions[event.code]();
  }
});
