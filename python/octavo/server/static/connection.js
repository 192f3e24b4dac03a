// Whether the server is there and takes requests: asked for every two seconds while somebody looks,
// said above the message box. `events` has "change".

import { health, ServerGone } from "./api.js";
import { $ } from "./dom.js";

const PERIOD = 2000; // milliseconds
const PERIOD_WHILE_AWAY = 700;

export const events = new EventTarget();
export let state = "unknown"; // then "ready", "away", "loading", "draining" or "unwell"

const SENTENCES = {
  away: "The server has stopped, or cannot be reached. What you wrote is kept, and this page goes on when the server is back.",
  loading: "The server is loading the model.",
  draining: "The server is shutting down and takes no new messages.",
};

function set(now, sentence = SENTENCES[now]) {
  $("banner").hidden = now === "ready";
  if ($("banner").textContent !== (sentence ?? "")) $("banner").textContent = sentence ?? "";
  if (now === state) return;
  state = now;
  $("send").disabled = now !== "ready";
  events.dispatchEvent(new Event("change"));
}

/** Note what a request met; true where the server is away. */
export function note(error) {
  if (error instanceof ServerGone) set("away");
  return error instanceof ServerGone;
}

async function look() {
  try {
    const { phase, status, reason } = await health();
    if (phase === "loading" || phase === "draining") set(phase);
    else if (status === "ok" && phase === "ready") set("ready");
    else set("unwell", `The server cannot answer: ${reason}`);
  } catch (error) {
    note(error);
  }
}

export async function watch() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, state === "away" ? PERIOD_WHILE_AWAY : PERIOD));
  }
}
