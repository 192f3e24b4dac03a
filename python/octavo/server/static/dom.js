// Small helpers that every file of the page uses.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; a string child is text, never markup. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function button(label, run, properties = {}) {
  const made = element("button", { type: "button", ...properties }, label);
  made.addEventListener("click", run);
  return made;
}

/** An icon of the page's own sheet, in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, run, properties = {}) {
  const made = button("", run, { ...properties, title: label, ariaLabel: label });
  made.append(icon(name));
  return made;
}

/** What the reader's browser remembers of the page; a browser may refuse to. */
export const memory = {
  get(key) {
    try {
      return localStorage.getItem(`octavo-${key}`);
    } catch {
      return null;
    }
  },
  /** A value that was written as JSON. */
  read(key, otherwise) {
    try {
      return JSON.parse(memory.get(key)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(key, value) {
    try {
      if (value === null || value === "") localStorage.removeItem(`octavo-${key}`);
      else localStorage.setItem(`octavo-${key}`, value);
    } catch {
      // Full, or forbidden: it holds until the page is left.
    }
  },
};

/** Put text on the clipboard, also where the page came over plain http from another machine. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { value: text, className: "visually-hidden" });
    const before = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

/** A button that copies what `text()` returns, and says that it did. */
export function copyButton(text, label = "Copy", properties = {}) {
  const made = button(
    label,
    async () => {
      made.textContent = (await copy(text())) ? "Copied" : "The browser refuses";
      setTimeout(() => (made.textContent = label), 1500);
    },
    properties,
  );
  return made;
}

/** Say something for a few seconds at the foot of the page, with something to do about it. */
export function toast(text, action = null) {
  const line = element("p", { className: "toast" }, text);
  const remove = () => line.remove();
  const timer = setTimeout(remove, 8000);
  if (action) {
    line.append(
      button(action.label, () => {
        clearTimeout(timer);
        remove();
        action.run();
      }),
    );
  }
  $("toasts").replaceChildren(line);
}
