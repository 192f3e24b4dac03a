// The documentation: colours and copy buttons for its examples, and every route with its fields, as
// the server's own description has them.

import { $, element } from "./dom.js";
import { colour, frameCode } from "./render.js";

for (const code of document.querySelectorAll("main pre > code")) {
  colour(code, code.className.replace("language-", ""));
  frameCode(code.parentElement);
}

/** A schema's type in words: "number, 0 to 1". */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(typeOf).join(", or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const limits = [
    low === undefined ? "" : schema.exclusiveMinimum === undefined ? `${low}` : `above ${low}`,
    schema.maximum === undefined ? "" : `${schema.maximum}`,
  ];
  const range = limits[0] && limits[1] ? limits.join(" to ") : limits[0] ? `from ${limits[0]}` : limits[1] && `up to ${limits[1]}`;
  return [schema.type ?? "anything", range].filter(Boolean).join(", ");
}

function fieldRow(name, schema, required) {
  const cells = [element("code", {}, name), typeOf(schema), required ? "needed" : ""];
  return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
}

function fieldTable(schema) {
  const needed = schema.required ?? [];
  const names = Object.keys(schema.properties);
  const sorted = [...needed, ...names.filter((name) => !needed.includes(name)).sort()];
  const head = element("tr", {}, ...["field", "type", ""].map((title) => element("th", {}, title)));
  const rows = sorted.map((name) => fieldRow(name, schema.properties[name], needed.includes(name)));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { className: "table" }, table);
}

function routeOf(path, method, operation, schemas) {
  const body = operation.requestBody?.content["application/json"].schema ?? {};
  const bodies = (body.anyOf ?? [body]).filter((one) => one.$ref).map((one) => schemas[one.$ref.split("/").at(-1)]);
  const line = [
    element("span", { className: `method ${method}` }, method.toUpperCase()),
    element("code", {}, path),
    element("span", { className: "soft" }, operation.description ?? operation.summary),
  ];
  if (!bodies.length) return element("p", { className: "route" }, ...line);
  return element("details", { className: "route" }, element("summary", {}, ...line), ...bodies.map(fieldTable));
}

async function showReference() {
  const { paths, components } = await (await fetch("/openapi.json")).json();
  const routes = Object.entries(paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]) => routeOf(path, method, operation, components.schemas)),
  );
  $("reference").replaceChildren(...routes);
}

showReference().catch(() => {
  $("reference").textContent = "The server cannot be reached.";
});
