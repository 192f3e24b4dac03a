// System message, sampling, and the model: each conversation has its own.
//
// conversation.settings holds what was changed, as the fields' texts; all else is as the server's
// defaults have it (of the model's generation_config.json), or the page's own.

import { get } from "./api.js";
import * as connection from "./connection.js";
import { $, element, toast } from "./dom.js";
import * as state from "./state.js";

const form = $("sampling");
const fields = [...form.elements].filter((field) => field.id && field.id !== "api-key" && field.type !== "button");
const NUMBERS = fields.filter((field) => ["range", "number"].includes(field.type)).map((field) => field.id);
const NEUTRAL = { temperature: 1, top_p: 1, min_p: 0, top_k: 0, repetition_penalty: 1 };
// For a model whose authors recommend nothing: plain sampling would be too wild for a small one.
const CAREFUL = { ...NEUTRAL, temperature: 0.7, min_p: 0.05 };

let defaults = { presence_penalty: 0, frequency_penalty: 0, max_tokens: 1024, ...CAREFUL };
let models = [];

const valueOf = (settings, name) => settings[name] ?? String(defaults[name] ?? "");

/** The model that a conversation is to be answered by. */
export function modelOf(conversation) {
  const names = models.map((model) => model.id);
  return names.includes(conversation.model) ? conversation.model : (names[0] ?? null);
}

/** The settings as fields of a request; those that are empty are left out. */
export function requestFields(conversation) {
  const { settings } = conversation;
  const found = {};
  for (const name of NUMBERS) {
    const value = valueOf(settings, name);
    if (value !== "") found[name] = Number(value);
  }
  if (settings.stop) found.stop = [settings.stop];
  const model = modelOf(conversation);
  if (model) found.model = model;
  return found;
}

function showValues() {
  for (const output of form.querySelectorAll("output")) {
    output.textContent = valueOf(state.current.settings, output.htmlFor[0]);
  }
}

function show() {
  for (const field of fields) field.value = valueOf(state.current.settings, field.id);
  showValues();
  showModels();
}

function showModels() {
  const choice = $("model-choice");
  choice.replaceChildren(
    ...models.map(({ id, parent }) => element("option", { value: id }, parent ? `${id} (adapter)` : id)),
  );
  choice.hidden = models.length < 2;
  choice.value = modelOf(state.current) ?? "";
}

/** What the server offers, asked for whenever it comes up: it may be another one. */
async function askServer() {
  try {
    const [listed, engine] = await Promise.all([get("/v1/models"), get("/engine")]);
    models = listed.data;
    const recommended = engine.sampling_defaults;
    const sampling = Object.keys(recommended).length ? { ...NEUTRAL, ...recommended } : CAREFUL;
    defaults = { ...defaults, ...sampling };
    show();
  } catch (error) {
    connection.note(error);
    if (error.status === 401) toast("This server asks for an API key: enter it under Settings.");
  }
}

form.addEventListener("input", ({ target }) => {
  if (!fields.includes(target)) return;
  const { settings } = state.current;
  settings[target.id] = target.value; // empty: left to the server
  showValues();
  state.save(state.current);
});
form.addEventListener("submit", (event) => event.preventDefault());
$("default-settings").addEventListener("click", () => {
  state.current.settings = {};
  show();
  state.save(state.current);
});
$("keep-settings").addEventListener("click", () => {
  state.keepSettingsForNew(state.current.settings);
  const label = $("keep-settings").textContent;
  $("keep-settings").textContent = "Kept";
  setTimeout(() => ($("keep-settings").textContent = label), 1500);
});
$("model-choice").addEventListener("change", () => {
  state.current.model = $("model-choice").value;
  state.save(state.current);
});
$("model-choice").addEventListener("focus", askServer); // adapters come and go
$("api-key").addEventListener("change", askServer);
state.events.addEventListener("current", show);
connection.events.addEventListener("change", () => {
  if (connection.state === "ready") askServer();
});
