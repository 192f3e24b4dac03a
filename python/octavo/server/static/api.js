// What the page asks of the server. The key stays in this tab's session storage.

import { $ } from "./dom.js";

const keyField = $("api-key");
if (keyField) {
  keyField.value = sessionStorage.getItem("octavo-key") ?? "";
  keyField.addEventListener("input", () => sessionStorage.setItem("octavo-key", keyField.value));
}

function headers() {
  const key = (sessionStorage.getItem("octavo-key") ?? "").trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Nobody answered, or not to the end: the server has stopped, or the network is down. */
export class ServerGone extends Error {}

/** The server's own words for what went wrong. */
async function failure(response) {
  let message = `the server answers with status ${response.status}`;
  try {
    ({ message } = (await response.json()).error);
  } catch {
    // Not octavo's own answer: something between may have written it.
  }
  return Object.assign(new Error(message), { status: response.status });
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerGone("the server cannot be reached");
  }
}

async function ask(path, options) {
  const response = await reach(path, options);
  if (!response.ok) throw await failure(response);
  return response;
}

/** {status, phase, reason} of the server, whether it is well or not. */
export async function health() {
  const response = await reach("/health", {});
  try {
    return await response.json();
  } catch {
    throw new ServerGone("something else answers in the server's place");
  }
}

export async function get(path) {
  return (await ask(path, {})).json();
}

/** The objects of a stream of server-sent events, until [DONE]. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ServerGone("the server has stopped in the middle of the answer");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}
