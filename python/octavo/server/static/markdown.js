// The little of Markdown that models write, as elements. Text only ever becomes text nodes, so
// nothing that a model says can be markup.

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

/** **bold**, *italic* and `code` within a line. */
function inline(text) {
  const nodes = [];
  const pattern = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    nodes.push(text.slice(end, found.index));
    const [whole, code, bold, italic] = found;
    nodes.push(
      code ? element("code", code) : bold ? element("strong", bold) : element("em", italic),
    );
    end = found.index + whole.length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

function withBreaks(lines) {
  return lines.flatMap((line, i) => (i ? [document.createElement("br"), ...inline(line)] : inline(line)));
}

const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;

function blockOf(lines) {
  if (lines.every((line) => ITEM.test(line))) {
    const numbered = lines[0].match(ITEM)[1];
    const list = element(numbered ? "ol" : "ul", ...lines.map((l) => element("li", ...inline(l.match(ITEM)[2]))));
    if (numbered) list.start = Number(numbered);
    return list;
  }
  const heading = lines.length === 1 && lines[0].match(/^#{1,6}\s+(.*)$/);
  return heading ? element("h4", ...inline(heading[1])) : element("p", ...withBreaks(lines));
}

/** Elements for a whole text, which may still be growing. */
export function render(text) {
  const blocks = [];
  let lines = [];
  let code = null;
  const flush = () => {
    if (lines.length) blocks.push(blockOf(lines));
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) {
      if (code) {
        blocks.push(element("pre", element("code", code.join("\n"))));
        code = null;
      } else {
        flush();
        code = [];
      }
    } else if (code) {
      code.push(line);
    } else if (!line.trim()) {
      flush();
    } else {
      if (lines.length && ITEM.test(line) !== ITEM.test(lines[0])) flush();
      lines.push(line);
    }
  }
  flush();
  if (code) blocks.push(element("pre", element("code", code.join("\n"))));
  return blocks;
}
