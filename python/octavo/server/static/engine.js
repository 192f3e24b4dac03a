// The live view: asked for four times a second while somebody looks.

import { get } from "./api.js";
import { explain } from "./chat.js";

const $ = (id) => document.getElementById(id);
const PERIOD = 250; // milliseconds
const HISTORY = 240; // a minute of it
const speeds = [];
let blocks = new Uint8Array();
let columns = 1;
let cell = 6; // pixels
let blocksPerCell = 1;

const role = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const seconds = (value) => (value == null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);
const count = (value) => value.toLocaleString("en");

/** Colours far apart for numbers that are near each other. */
function colourOf(owner) {
  const dark = document.documentElement.dataset.theme === "dark";
  return `hsl(${(owner * 137.5) % 360} 52% ${dark ? 62 : 48}%)`;
}

/** A canvas with as many device pixels as it has. */
function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const drawing = canvas.getContext("2d");
  drawing.scale(ratio, ratio);
  return drawing;
}

const MAP_HEIGHT = 250; // pixels, at most
const SMALLEST_CELL = 5;

/** The largest cells that keep the map low; of a large cache each stands for several blocks. */
function layOut(width) {
  for (cell = 16; cell > SMALLEST_CELL; cell -= 1) {
    if (Math.floor(width / cell) * Math.floor(MAP_HEIGHT / cell) >= blocks.length) break;
  }
  columns = Math.floor(width / cell);
  blocksPerCell = Math.ceil(blocks.length / (columns * Math.floor(MAP_HEIGHT / cell)));
}

function drawMap() {
  const canvas = $("kv-map");
  const width = canvas.parentElement.clientWidth;
  if (!blocks.length || !width) return;
  layOut(width);
  const cells = Math.ceil(blocks.length / blocksPerCell);
  const drawing = context(canvas, width, Math.ceil(cells / columns) * cell);
  const fixed = [role("--blank"), role("--cached"), role("--shared")];
  for (let i = 0; i < cells; i += 1) {
    // Who holds a block counts for more than what lies free: the numbers of owners are the largest.
    const kind = Math.max(...blocks.subarray(i * blocksPerCell, (i + 1) * blocksPerCell));
    drawing.fillStyle = fixed[kind] ?? colourOf(kind);
    drawing.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - 1, cell - 1);
  }
}

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
  const row = document.createElement("tr");
  row.className = request.state;
  const name = document.createElement("td");
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  if (request.owners.length) swatch.style.background = colourOf(request.owners[0]);
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = request.id.replace(/^(chatcmpl|cmpl)-/, "").slice(0, 8);
  button.title = `${request.id}: where did the time go?`;
  button.addEventListener("click", () => explain(request.id));
  name.append(swatch, button);
  const answer = request.state === "waiting" ? "waits" : count(request.output_tokens);
  const cells = [count(request.prompt_tokens), request.n > 1 ? `${answer} (${request.n})` : answer, request.age.toFixed(1)];
  row.append(name, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return row;
}

function show(found) {
  const { stats, speed } = found;
  $("model").textContent = `${found.model} · context ${count(found.max_model_len)} · up to ${found.max_num_seqs} at a time`;
  $("engine-state").textContent = found.phase;
  $("engine-state").classList.toggle("bad", found.phase !== "ready");
  speeds.push(speed.tokens_per_second);
  if (speeds.length > HISTORY) speeds.shift();
  $("tokens-per-second").textContent = Math.round(speed.tokens_per_second);
  $("running").textContent = stats.num_running;
  $("waiting").textContent = stats.num_waiting;
  $("ttft").textContent = seconds(speed.ttft_p50);
  $("steps").textContent = speed.steps_per_second.toFixed(0);
  $("why").hidden = !stats.num_waiting || !stats.waiting_for;
  $("why").textContent = stats.waiting_for ? `The first in the queue waits, since ${stats.waiting_for}.` : "";
  blocks = Uint8Array.from(atob(found.blocks.map), (character) => character.charCodeAt(0));
  const used = stats.num_used_blocks ?? 0;
  $("kv-use").textContent = `${used} of ${count(blocks.length)} blocks in use`;
  $("kv-map").setAttribute("aria-label", `KV cache: ${used} of ${blocks.length} blocks in use, ${stats.num_cached_blocks ?? 0} cached`);
  const asked = stats.num_prefix_queries ?? 0;
  const hits = asked ? `${Number(((100 * stats.num_prefix_hits) / asked).toPrecision(2))} % of prompt tokens were cached` : "";
  const preempted = stats.num_preemptions ? `${stats.num_preemptions} preemptions` : "";
  if (!$("kv-map").matches(":hover")) $("under-map").textContent = [hits, preempted].filter(Boolean).join(" · ");
  $("requests").replaceChildren(...found.requests.map(requestRow));
  $("no-requests").hidden = found.requests.length > 0;
  drawMap();
  drawSparkline();
}

function showProblem(error) {
  const state = $("engine-state");
  state.classList.add("bad");
  state.textContent = error.status === 401 ? "key needed" : error.status === 503 ? "loading" : "not reached";
  $("model").textContent = error.status ? error.message : "the server cannot be reached";
}

async function watch() {
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

$("kv-map").addEventListener("pointermove", (event) => {
  const index = (Math.floor(event.offsetY / cell) * columns + Math.floor(event.offsetX / cell)) * blocksPerCell;
  if (event.offsetX >= columns * cell || index >= blocks.length) return;
  const kinds = ["free", "free, its content cached", "shared by several answers"];
  const some = blocks.subarray(index, index + blocksPerCell);
  const held = some.filter((kind) => kind > 1).length;
  $("under-map").textContent =
    some.length > 1
      ? `Blocks ${count(index)} to ${count(index + some.length - 1)}: ${held} held by answers`
      : `Block ${count(index)}: ${kinds[some[0]] ?? "held by one answer"}`;
});
window.addEventListener("resize", () => {
  drawMap();
  drawSparkline();
});
document.addEventListener("themechange", () => {
  drawMap();
  drawSparkline();
});

watch();
