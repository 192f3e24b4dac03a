// The conversation follows its end while somebody reads there, and stays where it is while somebody
// reads further up.

import { $ } from "./dom.js";

const messages = $("messages");
const NEAR = 32; // pixels from the end that still are the end
let follows = true;

const distance = () => messages.scrollHeight - messages.scrollTop - messages.clientHeight;

function toEnd() {
  messages.scrollTo({ top: messages.scrollHeight, behavior: "instant" });
}

/** Called after the text has grown; `always` where the reader has asked to see the end. */
export function follow(always = false) {
  if (always) follows = true;
  if (follows) toEnd();
  $("to-end").hidden = follows || distance() < NEAR;
}

/** Keep an element where it is on the screen while `change` alters what is above it. */
export function hold(change) {
  const { scrollTop } = messages;
  change();
  messages.scrollTo({ top: scrollTop, behavior: "instant" });
  follows = distance() < NEAR;
}

let before = 0;
messages.addEventListener("scroll", () => {
  // Going up lets go at once, also of an end that is just growing.
  if (messages.scrollTop < before - 1 && distance() > 1) follows = false;
  else if (distance() < NEAR) follows = true;
  before = messages.scrollTop;
  $("to-end").hidden = follows;
});
$("to-end").addEventListener("click", () => follow(true));
new ResizeObserver(() => follow()).observe(messages);
