// The map of the KV cache: a cell for each block, or for several, and a bar of the whole cache.
//
// A large cache is mostly blank, and blank blocks are taken in order, so the map shows the blocks
// up to the last that has been used, as large as they fit; the bar shows how much of the cache
// that is.

import { $ } from "./dom.js";

const MAP_HEIGHT = 220; // pixels, at most
const LARGEST_CELL = 16;
const SMALLEST_CELL = 6;
const FEWEST = 64; // blocks shown, so that a first answer does not fill the map

let blocks = new Uint8Array(); // 0 blank, 1 cached, 2 shared, from 3 on: who holds it
let shownBlocks = 0;
let columns = 1;
let cell = SMALLEST_CELL; // pixels
let blocksPerCell = 1;

export const role = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const count = (value) => value.toLocaleString("en");

/** Colours far apart for numbers that are near each other. */
export function colourOf(owner) {
  const dark = document.documentElement.dataset.theme === "dark";
  return `hsl(${(owner * 137.5) % 360} 52% ${dark ? 62 : 48}%)`;
}

/** A canvas with as many device pixels as it has. */
export function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const drawing = canvas.getContext("2d");
  drawing.scale(ratio, ratio);
  return drawing;
}

/** How many blocks the map shows: up to the last one in use, in steps of a doubling. */
function extent() {
  let last = blocks.length;
  while (last > 0 && blocks[last - 1] === 0) last -= 1;
  let shown = FEWEST;
  while (shown < last) shown *= 2;
  return Math.min(shown, blocks.length);
}

/** The largest cells that keep the map low; of a large cache each stands for several blocks. */
function layOut(width) {
  for (cell = LARGEST_CELL; cell > SMALLEST_CELL; cell -= 1) {
    if (Math.floor(width / cell) * Math.floor(MAP_HEIGHT / cell) >= shownBlocks) break;
  }
  columns = Math.floor(width / cell);
  shownBlocks = Math.min(Math.ceil(shownBlocks / columns) * columns, blocks.length); // whole rows
  blocksPerCell = Math.ceil(shownBlocks / (columns * Math.floor(MAP_HEIGHT / cell)));
}

function drawMap(width) {
  layOut(width);
  const cells = Math.ceil(shownBlocks / blocksPerCell);
  const drawing = context($("kv-map"), width, Math.ceil(cells / columns) * cell);
  const fixed = [role("--blank"), role("--cached"), role("--shared")];
  for (let i = 0; i < cells; i += 1) {
    // Who holds a block counts for more than what lies free: the numbers of owners are the largest.
    const last = Math.min((i + 1) * blocksPerCell, shownBlocks);
    const kind = Math.max(...blocks.subarray(i * blocksPerCell, last));
    drawing.fillStyle = fixed[kind] ?? colourOf(kind);
    drawing.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - 1, cell - 1);
  }
}

/** The whole cache as one bar: held, cached, free; what is there is at least two pixels wide. */
function drawBar(width, held, cached) {
  const drawing = context($("kv-bar"), width, 8);
  const wide = (number) => (number ? Math.max(2, (width * number) / blocks.length) : 0);
  const parts = [
    [role("--accent"), wide(held)],
    [role("--cached"), wide(cached)],
    [role("--blank"), width],
  ];
  let left = 0;
  for (const [colour, size] of parts) {
    drawing.fillStyle = colour;
    drawing.fillRect(left, 0, size, 8);
    left += size;
  }
}

/** Draw the map again, of what `show` was given last. */
export function drawAgain() {
  const width = $("kv-map").parentElement.clientWidth;
  if (!blocks.length || !width) return;
  let held = 0;
  let cached = 0;
  for (const kind of blocks) {
    if (kind > 1) held += 1;
    else cached += kind;
  }
  shownBlocks = extent();
  drawBar(width, held, cached);
  drawMap(width);
  $("kv-use").textContent = `${count(held)} held · ${count(cached)} cached`;
  $("kv-map").setAttribute("aria-label", `KV cache: of ${blocks.length} blocks ${held} held by answers, ${cached} cached`);
}

/** Take in the blocks of {size, map}, size being in tokens. */
export function show({ size, map }) {
  blocks = Uint8Array.from(atob(map), (character) => character.charCodeAt(0));
  drawAgain();
  const part =
    shownBlocks < blocks.length ? `Blocks 0 to ${count(shownBlocks - 1)} of ${count(blocks.length)}` : `${count(blocks.length)} blocks`;
  $("kv-extent").textContent = `${part}, of ${size} tokens each.${shownBlocks < blocks.length ? " The others are blank." : ""}`;
}

function describe(index) {
  const kinds = ["blank", "free, its content cached", "shared by several answers"];
  const some = blocks.subarray(index, Math.min(index + blocksPerCell, shownBlocks));
  if (some.length === 1) return `Block ${count(index)}: ${kinds[some[0]] ?? "held by one answer"}`;
  const held = some.filter((kind) => kind > 1).length;
  return `Blocks ${count(index)} to ${count(index + some.length - 1)}: ${held} held by answers`;
}

$("kv-map").addEventListener("pointermove", (event) => {
  const index = (Math.floor(event.offsetY / cell) * columns + Math.floor(event.offsetX / cell)) * blocksPerCell;
  if (event.offsetX < columns * cell && index < shownBlocks) $("under-map").textContent = describe(index);
});
