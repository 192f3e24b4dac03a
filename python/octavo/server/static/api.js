// What the page asks of the server. The key stays in this tab's session storage.

const keyField = document.getElementById("api-key");
keyField.value = sessionStorage.getItem("octavo-key") ?? "";
keyField.addEventListener("input", () => sessionStorage.setItem("octavo-key", keyField.value));

function headers() {
  const key = keyField.value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The server's own words for what went wrong. */
async function failure(response) {
  try {
    const { error } = await response.json();
    return Object.assign(new Error(error.message), { status: response.status });
  } catch {
    return Object.assign(new Error(`status ${response.status}`), { status: response.status });
  }
}

export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** The objects of a stream of server-sent events, until [DONE]. */
export async function* stream(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
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
