// "Where did the time go?": what the server's event log knows of a request, in sentences.

import { get } from "./api.js";
import { $, element } from "./dom.js";

export async function explain(id) {
  $("explanation-id").textContent = id;
  let sentences;
  try {
    ({ sentences } = await get(`/engine/requests/${encodeURIComponent(id)}`));
  } catch (error) {
    sentences = [error.message];
  }
  $("sentences").replaceChildren(...sentences.map((sentence) => element("li", {}, sentence)));
  $("explanation").showModal();
}
