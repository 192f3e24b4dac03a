// Conversations in the browser's own database (IndexedDB): they never leave this browser, other
// than as messages to the server that is asked. Where a browser gives no database, nothing is kept.

const NAME = "octavo";
const STORE = "conversations";

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const database = new Promise((resolve, reject) => {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
}).catch(() => null);

async function store(mode) {
  const found = await database;
  return found && found.transaction(STORE, mode).objectStore(STORE);
}

/** Whether conversations outlive the page. */
export async function isKept() {
  return (await database) !== null;
}

export async function readAll() {
  const found = await store("readonly");
  return found ? promise(found.getAll()) : [];
}

export async function read(id) {
  const found = await store("readonly");
  return found ? promise(found.get(id)) : undefined;
}

/** Write a conversation; messages that another tab has added to it meanwhile stay. */
export async function write(conversation) {
  const found = await store("readwrite");
  if (!found) return;
  const before = await promise(found.get(conversation.id));
  const nodes = { ...before?.nodes, ...conversation.nodes };
  await promise(found.put({ ...conversation, nodes }));
}

export async function remove(id) {
  const found = await store("readwrite");
  if (found) await promise(found.delete(id));
}
