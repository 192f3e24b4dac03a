// The conversation: messages, streaming, and what each answer took.

import { get, stream } from "./api.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const messages = $("messages");
const prompt = $("prompt");
const conversation = [];
let controller = null;

const NUMBERS = ["temperature", "top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];

/** The settings as fields of a request; those that are left empty are left out. */
function sampling() {
  const fields = {};
  for (const name of NUMBERS) {
    if ($(name).value !== "") fields[name] = Number($(name).value);
  }
  if ($("stop").value) fields.stop = [$("stop").value];
  return fields;
}

function addMessage(role, text) {
  $("welcome").hidden = true;
  const message = document.createElement("article");
  message.className = `message ${role}`;
  message.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = text;
  message.append(body);
  messages.append(message);
  scrollDown(true);
  return message;
}

/** Follow the text as it grows, unless the reader has scrolled away. */
function scrollDown(always = false) {
  const distance = messages.scrollHeight - messages.scrollTop - messages.clientHeight;
  if (always || distance < 120) messages.scrollTo({ top: messages.scrollHeight, behavior: "instant" });
}

function fact(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span;
}

function action(label, run) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", run);
  return button;
}

function addFacts(message, answer) {
  const facts = document.createElement("div");
  facts.className = "facts";
  const seconds = (answer.ended - answer.first) / 1000;
  if (answer.usage) {
    const { completion_tokens: made, prompt_tokens: read } = answer.usage;
    const cached = answer.usage.prompt_tokens_details?.cached_tokens ?? 0;
    facts.append(fact(`${read} tokens read${cached ? `, ${cached} of them cached` : ""}`));
    facts.append(fact(`${made} written`));
    if (made > 1 && seconds > 0) facts.append(fact(`${((made - 1) / seconds).toFixed(1)} a second`));
  }
  if (answer.first) facts.append(fact(`first after ${((answer.first - answer.started) / 1000).toFixed(2)} s`));
  const endings = { length: "cut off at its longest", stopped: "stopped by you", timeout: "out of time" };
  if (endings[answer.reason]) facts.append(fact(endings[answer.reason]));
  facts.append(action("Copy", () => navigator.clipboard?.writeText(answer.text)));
  if (answer.id) facts.append(action("Where did the time go?", () => explain(answer.id)));
  facts.append(action("Again", regenerate));
  message.append(facts);
}

export async function explain(id) {
  $("explanation-id").textContent = id;
  let sentences;
  try {
    ({ sentences } = await get(`/engine/requests/${encodeURIComponent(id)}`));
  } catch (error) {
    sentences = [error.message];
  }
  $("sentences").replaceChildren(
    ...sentences.map((sentence) => {
      const item = document.createElement("li");
      item.textContent = sentence;
      return item;
    }),
  );
  $("explanation").showModal();
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop-button").hidden = !busy;
  messages.setAttribute("aria-busy", busy);
}

async function answerTo(turns) {
  controller = new AbortController();
  setBusy(true);
  const message = addMessage("assistant", "");
  const body = message.querySelector(".text");
  message.classList.add("writing");
  const answer = { text: "", started: performance.now(), first: 0, ended: 0, reason: null, usage: null, id: null };
  let frame = 0;
  const draw = () => {
    frame = 0;
    body.replaceChildren(...render(answer.text));
    scrollDown();
  };
  try {
    const system = $("system").value.trim();
    const all = system ? [{ role: "system", content: system }, ...turns] : turns;
    const request = { messages: all, stream: true, stream_options: { include_usage: true }, ...sampling() };
    for await (const event of stream("/v1/chat/completions", request, controller.signal)) {
      answer.id = event.id;
      answer.usage = event.usage ?? answer.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) {
        answer.first ||= performance.now();
        answer.text += choice.delta.content;
        frame ||= requestAnimationFrame(draw);
      }
      answer.reason = choice.finish_reason ?? answer.reason;
    }
  } catch (error) {
    if (error.name === "AbortError") {
      answer.reason = "stopped";
    } else {
      const problem = document.createElement("p");
      problem.className = "error";
      problem.setAttribute("role", "alert");
      problem.textContent = error.message;
      message.append(problem);
    }
  }
  answer.ended = performance.now();
  cancelAnimationFrame(frame);
  draw();
  message.classList.remove("writing");
  addFacts(message, answer);
  scrollDown();
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  controller = null;
  setBusy(false);
  prompt.focus();
}

export function send(text) {
  const content = text.trim();
  if (!content || controller) return;
  addMessage("user", content);
  conversation.push({ role: "user", content });
  prompt.value = "";
  fitPrompt();
  answerTo([...conversation]);
}

function regenerate() {
  if (controller) return;
  while (conversation.length && conversation.at(-1).role === "assistant") conversation.pop();
  const last = [...messages.querySelectorAll(".message.assistant")].at(-1);
  if (conversation.length) {
    last?.remove();
    answerTo([...conversation]);
  }
}

export function stop() {
  controller?.abort();
}

export function newChat() {
  stop();
  conversation.length = 0;
  messages.querySelectorAll(".message").forEach((message) => message.remove());
  $("welcome").hidden = false;
  prompt.focus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(prompt.value);
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
$("stop-button").addEventListener("click", stop);
$("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) send(event.target.textContent);
});
