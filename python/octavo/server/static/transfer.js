// Conversations as files: export as JSON or Markdown, import of JSON.

import { $, element, toast } from "./dom.js";
import * as state from "./state.js";
import { asFile, asMarkdown, readFile } from "./tree.js";

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A title as a name of a file. */
const nameOf = (conversation) =>
  conversation.title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 50) || "conversation";

const exports = {
  "export-markdown": () => download(`${nameOf(state.current)}.md`, asMarkdown(state.current), "text/markdown"),
  "export-json": () => download(`${nameOf(state.current)}.json`, asFile([state.current]), "application/json"),
  "export-all": () => download("octavo-conversations.json", asFile(state.list()), "application/json"),
};
for (const [id, run] of Object.entries(exports)) {
  $(id).addEventListener("click", () => {
    $("export-menu").hidePopover();
    run();
  });
}
$("export-menu").addEventListener("toggle", () => {
  const isNew = state.isNew(state.current);
  $("export-markdown").disabled = isNew;
  $("export-json").disabled = isNew;
  $("export-all").disabled = !state.list().length;
});

async function importFiles(files) {
  try {
    const found = [];
    for (const file of files) found.push(...readFile(await file.text()));
    await state.add(found);
    if (found.length) state.open(found[0].id);
    toast(`Imported ${found.length} ${found.length === 1 ? "conversation" : "conversations"}.`);
  } catch (error) {
    toast(`Nothing imported: ${error.message}.`);
  }
}

$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async () => {
  await importFiles([...$("import-file").files]);
  $("import-file").value = ""; // so that the same file can be chosen again
});
