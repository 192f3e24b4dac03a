// The live view: asked for four times a second while somebody looks.

import { get } from "./api.js";
import * as connection from "./connection.js";
import { $, button, element } from "./dom.js";
import { explain } from "./explain.js";
import * as kvMap from "./kv_map.js";
import { colourOf, context, count, role } from "./kv_map.js";

const PERIOD = 250; // milliseconds
const HISTORY = 240; // a minute of it
const speeds = [];

const seconds = (value) => (value == null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

function drawSparkline() {
  const canvas = $("sparkline");
  const width = canvas.parentElement.clientWidth;
  const height = 44;
  const drawing = context(canvas, width, height);
  const most = Math.max(10, ...speeds);
  drawing.beginPath();
  speeds.forEach((speed, i) => {
    const x = width - (speeds.length - 1 - i) * (width / (HISTORY - 1));
    const y = height - 3 - (speed / most) * (height - 8);
    if (i) drawing.lineTo(x, y);
    else drawing.moveTo(x, y);
  });
  drawing.strokeStyle = role("--accent");
  drawing.lineWidth = 1.6;
  drawing.stroke();
  const left = width - (speeds.length - 1) * (width / (HISTORY - 1));
  drawing.lineTo(width, height);
  drawing.lineTo(left, height);
  drawing.globalAlpha = 0.12;
  drawing.fillStyle = role("--accent");
  drawing.fill();
}

function requestRow(request) {
  const swatch = element("span", { className: "swatch" });
  if (request.owners.length) swatch.style.background = colourOf(request.owners[0]);
  const name = request.id.replace(/^(chatcmpl|cmpl)-/, "").slice(0, 8);
  const ask = button(name, () => explain(request.id), { title: `${request.id}: where did the time go?` });
  const answer = request.state === "waiting" ? "waits" : count(request.output_tokens);
  const cells = [count(request.prompt_tokens), request.n > 1 ? `${answer} (${request.n})` : answer, request.age.toFixed(1)];
  const row = element("tr", { className: request.state }, element("td", {}, swatch, ask));
  row.append(...cells.map((text) => element("td", {}, text)));
  return row;
}

let requests = [];

/** The rows of requests; a row that has the focus keeps it. */
function showRequests(found = requests) {
  requests = found;
  const focused = document.activeElement?.closest("#requests button")?.title;
  $("requests").replaceChildren(...requests.map(requestRow));
  $("no-requests").hidden = requests.length > 0;
  if (focused) [...$("requests").querySelectorAll("button")].find((each) => each.title === focused)?.focus();
}

function showState(text, isBad) {
  $("engine-state").textContent = text;
  $("engine-state").classList.toggle("bad", isBad);
}

function show(found) {
  const { stats, speed } = found;
  $("model").textContent = `${found.model} · context ${count(found.max_model_len)} · up to ${found.max_num_seqs} at a time`;
  showState(found.phase, found.phase !== "ready");
  speeds.push(speed.tokens_per_second);
  if (speeds.length > HISTORY) speeds.shift();
  $("tokens-per-second").textContent = Math.round(speed.tokens_per_second);
  $("running").textContent = stats.num_running;
  $("waiting").textContent = stats.num_waiting;
  $("ttft").textContent = seconds(speed.ttft_p50);
  $("steps").textContent = speed.steps_per_second.toFixed(0);
  $("why").hidden = !stats.num_waiting || !stats.waiting_for;
  $("why").textContent = stats.waiting_for ? `The first in the queue waits, since ${stats.waiting_for}.` : "";
  const asked = stats.num_prefix_queries ?? 0;
  const hits = asked ? `${Number(((100 * stats.num_prefix_hits) / asked).toPrecision(2))} % of prompt tokens were cached` : "";
  const preempted = stats.num_preemptions ? `${stats.num_preemptions} preemptions` : "";
  if (!$("kv-map").matches(":hover")) $("under-map").textContent = [hits, preempted].filter(Boolean).join(" · ");
  showRequests(found.requests);
  kvMap.show(found.blocks);
  drawSparkline();
}

function showProblem(error) {
  if (connection.note(error)) showState("stopped", true);
  else if (error.status === 401) showState("key needed", true);
  else showState(error.status === 503 ? "loading" : "no answer", true);
  $("model").textContent = error.status === 401 ? "enter the API key under Settings" : error.message;
  for (const id of ["tokens-per-second", "running", "waiting", "steps"]) $(id).textContent = "0";
  showRequests([]);
}

export async function watch() {
  for (;;) {
    const isSeen = !document.hidden && !$("engine").hidden;
    try {
      if (isSeen) show(await get("/engine"));
    } catch (error) {
      showProblem(error);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
  }
}

function drawAgain() {
  kvMap.drawAgain();
  drawSparkline();
  showRequests(); // their colours are those of the map
}
window.addEventListener("resize", drawAgain);
document.addEventListener("themechange", drawAgain);
