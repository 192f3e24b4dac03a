// Markdown as elements: markdown-it reads it, highlight.js colours code, DOMPurify lets through the
// tags and attributes listed here. Three walls stand between an answer and a script: markdown-it
// passes no HTML (it is shown as text), DOMPurify knows only this list, and the page's
// Content-Security-Policy runs no script but the files of the server.

import { copyButton, element } from "./dom.js";
import hljs from "./vendor/highlight.min.js";
import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";
import "./vendor/purify.min.js";

const CLEAN = {
  ALLOWED_TAGS: [
    ..."a blockquote br code em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong".split(" "),
    ..."table tbody td th thead tr ul".split(" "),
  ],
  ALLOWED_ATTR: ["class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["start"], // the number of a list's first item is no address
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const LONGEST_COLOURED = 40_000; // characters; longer code is shown without colours
const MOST_REMEMBERED = 200;

const coloured = new Map(); // language and code -> HTML; a text that grows is drawn again and again
function highlight(code, language) {
  if (!hljs.getLanguage(language) || code.length > LONGEST_COLOURED) return "";
  const key = `${language}\n${code}`;
  if (!coloured.has(key)) {
    if (coloured.size >= MOST_REMEMBERED) coloured.delete(coloured.keys().next().value);
    coloured.set(key, hljs.highlight(code, { language, ignoreIllegals: true }).value);
  }
  return coloured.get(key);
}

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true, highlight });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // else "app.py" would be a site
markdown.validateLink = (url) => /^(?:https?:|mailto:)/i.test(url.trim());

// A picture would be asked of another host, which would learn of it: its address is a link.
markdown.renderer.rules.image = (tokens, index) => {
  const { content } = tokens[index];
  const { escapeHtml } = markdown.utils;
  const url = tokens[index].attrGet("src");
  return `<a href="${escapeHtml(url)}">picture: ${escapeHtml(content || url)}</a>`;
};

// Models break lines within the cells of tables with <br>, since Markdown has no other way.
markdown.inline.ruler.before("html_inline", "br", (state, silent) => {
  const found = /^<br\s*\/?>/i.exec(state.src.slice(state.pos, state.pos + 8));
  if (!found) return false;
  if (!silent) state.push("hardbreak", "br", 0);
  state.pos += found[0].length;
  return true;
});

// Columns are aligned by class, for the policy forbids style="..."; "- [x]" is a task.
markdown.core.ruler.push("classes", (state) => {
  state.tokens.forEach((token, i) => {
    const style = token.attrGet("style");
    if (style) {
      token.attrs = [["class", style.replace("text-align:", "")]];
    }
    const inline = state.tokens[i + 2];
    if (token.type !== "list_item_open" || inline?.type !== "inline") return;
    const box = /^\[([ xX])\]\s+/.exec(inline.content);
    if (!box || inline.children[0]?.type !== "text") return;
    inline.children[0].content = inline.children[0].content.replace(/^\[[ xX]\]\s*/, "");
    token.attrJoin("class", box[1] === " " ? "task" : "task done");
  });
});

/** The HTML of each top-level block. */
function blocksOf(text) {
  const env = {};
  const blocks = [];
  let block = [];
  let depth = 0;
  for (const token of markdown.parse(text, env)) {
    block.push(token);
    depth += token.nesting;
    if (depth === 0) {
      blocks.push(markdown.renderer.render(block, markdown.options, env));
      block = [];
    }
  }
  return blocks;
}

/** HTML as a fragment that holds nothing but what CLEAN lists. */
export const sanitized = (html) => window.DOMPurify.sanitize(html, CLEAN);

/** A block as nodes, with what only the page itself may add: buttons, boxes, where links open. */
function nodesOf(html) {
  const fragment = sanitized(html);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const item of fragment.querySelectorAll("li.task")) {
    const box = { type: "checkbox", disabled: true, checked: item.classList.contains("done") };
    item.prepend(element("input", { ...box, ariaLabel: box.checked ? "done" : "to do" }));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return [...fragment.childNodes];
}

/** The language above, a button that copies, and lines that can be scrolled with the keyboard. */
export function frameCode(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const frame = element("div", { className: "code" });
  const text = () => code.textContent.replace(/\n$/, "");
  const head = element("div", { className: "code-head" }, element("span", {}, language));
  head.append(copyButton(text, "Copy", { ariaLabel: "Copy the code" }));
  pre.tabIndex = 0;
  pre.replaceWith(frame);
  frame.append(head, pre);
}

/** Colour a code element that the page itself wrote. */
export function colour(code, language) {
  const fragment = sanitized(highlight(code.textContent, language));
  if (fragment.textContent) code.replaceChildren(fragment);
}

const drawn = new WeakMap(); // container -> its blocks as {html, nodes}

/** Draw a text, which may still be growing: blocks that are as before are left alone. */
function drawBlocks(container, text) {
  const blocks = drawn.get(container) ?? [];
  const wanted = blocksOf(text);
  let same = 0;
  while (same < wanted.length && blocks[same]?.html === wanted[same]) same += 1;
  for (const { nodes } of blocks.splice(same)) nodes.forEach((node) => node.remove());
  for (const html of wanted.slice(same)) {
    const nodes = nodesOf(html);
    container.append(...nodes);
    blocks.push({ html, nodes });
  }
  drawn.set(container, blocks);
}

/** What an answer thinks first, between <think> tags, and the rest; null without it. */
export function thoughtOf(text) {
  const found = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(text);
  return found && { thought: found[1], rest: text.slice(found[0].length) };
}

/** Draw an answer; what it thinks is folded away. */
export function draw(container, text) {
  const found = thoughtOf(text);
  let thoughts = container.querySelector(":scope > .thoughts");
  if (found && !thoughts) {
    thoughts = element("details", { className: "thoughts" }, element("summary", {}, "Thoughts"));
    thoughts.append(element("div"));
    container.prepend(thoughts);
  }
  if (found) drawBlocks(thoughts.lastElementChild, found.thought);
  else thoughts?.remove();
  drawBlocks(container, found ? found.rest : text);
}
