// A conversation is a tree of messages: an edited message, and another answer, are siblings of what
// was there before. Nothing here touches the page or the browser's storage.
//
//   conversation  {id, title, created, updated, model, settings, nodes: {id: node}, leaf}
//   node          {id, parent, role, content, created, facts}; parent is null for a first message
//
// `leaf` is the last message of the branch that is shown.

const ROLES = ["user", "assistant"];

/** randomUUID would need https, or a server on this machine. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = {}, model = null) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model, settings, nodes: {}, leaf: null };
}

/** Add a message below `parent` (an id, or null), and show its branch. */
export function addNode(conversation, parent, role, content) {
  const node = { id: newId(), parent, role, content, created: Date.now(), facts: null };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = node.created;
  conversation.title ||= titleOf(content);
  return node;
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** The messages of the branch that is shown, first to last; of another with its leaf. */
export function branch(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.push(node);
  return found.reverse();
}

function inOrder(nodes) {
  return nodes.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** Messages that stand in each other's place, oldest first. */
export function siblings(conversation, node) {
  return inOrder(Object.values(conversation.nodes).filter((other) => other.parent === node.parent));
}

/** Show the branch through a node, down to the newest message below it. */
export function showBranch(conversation, node) {
  let last = node;
  for (;;) {
    const below = inOrder(Object.values(conversation.nodes).filter((other) => other.parent === last.id));
    if (!below.length) break;
    last = below.at(-1);
  }
  conversation.leaf = last.id;
}

/** Whether each word of a search is in the title or in a message. */
export function matches(conversation, search) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const texts = [conversation.title, ...Object.values(conversation.nodes).map((node) => node.content)];
  const all = texts.join("\n").toLowerCase();
  return words.every((word) => all.includes(word));
}

/** The branch that is shown, for other programs and for people. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push(`> ${conversation.settings.system.replaceAll("\n", "\n> ")}`);
  for (const node of branch(conversation)) {
    parts.push(`## ${node.role === "user" ? "You" : (node.facts?.model ?? "Answer")}`, node.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

// ---- files ----

export const FORMAT = "octavo-conversations";

export function asFile(conversations) {
  return `${JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1)}\n`;
}

function check(condition, message) {
  if (!condition) throw new Error(message);
}

const isText = (value) => typeof value === "string";
const isTable = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const isId = (value) => isText(value) && /^[A-Za-z0-9-]{1,64}$/.test(value);

/** Entries of a table whose values are of this type. */
function only(table, type) {
  return Object.fromEntries(Object.entries(table).filter(([, value]) => typeof value === type));
}

/** What an answer took: see chat.js. */
function readFacts(found) {
  const numbers = ["read", "cached", "written", "first", "seconds"];
  const texts = ["id", "model", "reason", "error"];
  const facts = {};
  for (const name of numbers) if (Number.isFinite(found[name])) facts[name] = found[name];
  for (const name of texts) if (isText(found[name])) facts[name] = found[name];
  return facts;
}

function readNode(id, found) {
  check(isId(id) && isTable(found) && found.id === id, `the message ${JSON.stringify(id)} is no message`);
  check(ROLES.includes(found.role), `a message's role is ${JSON.stringify(found.role)}; expected user or assistant`);
  check(isText(found.content), "a message's content is no text");
  check(found.parent === null || isText(found.parent), "a message's parent is neither an id nor null");
  const facts = isTable(found.facts) ? readFacts(found.facts) : null;
  const created = Number(found.created) || 0;
  return { id, parent: found.parent, role: found.role, content: found.content, created, facts };
}

/** A conversation of a file, checked; only what the page knows is taken over. */
function readConversation(found) {
  check(isTable(found) && isId(found.id) && isTable(found.nodes), "a conversation has no id or no messages");
  const nodes = {};
  for (const [id, node] of Object.entries(found.nodes)) nodes[id] = readNode(id, node);
  for (const node of Object.values(nodes)) {
    let steps = 0;
    for (let up = node; up.parent !== null; up = nodes[up.parent]) {
      check(Object.hasOwn(nodes, up.parent), `the message ${JSON.stringify(up.id)} answers one that is not there`);
      steps += 1;
      check(steps <= Object.keys(nodes).length, "messages answer each other in a circle");
    }
  }
  const list = Object.values(nodes);
  const leaf = Object.hasOwn(nodes, found.leaf) ? found.leaf : (inOrder(list).at(-1)?.id ?? null);
  const title = isText(found.title) ? found.title.slice(0, 200) : "";
  return {
    id: found.id,
    title: title || titleOf(list[0]?.content ?? ""),
    created: Number(found.created) || Date.now(),
    updated: Number(found.updated) || Date.now(),
    model: isText(found.model) ? found.model : null,
    settings: isTable(found.settings) ? only(found.settings, "string") : {},
    nodes,
    leaf,
  };
}

/** The conversations of an exported file; an Error says what is wrong with it. */
export function readFile(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("the file is no JSON; expected one that this page exported");
  }
  check(found?.format === FORMAT, `the file's format is ${JSON.stringify(found?.format)}; expected "${FORMAT}"`);
  check(found.version === 1, `the file's version is ${JSON.stringify(found.version)}; expected 1`);
  check(Array.isArray(found.conversations), "the file has no list of conversations");
  return found.conversations.map(readConversation);
}
