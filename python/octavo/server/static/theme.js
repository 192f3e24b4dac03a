// Light or dark, before anything is drawn: as the system has it, until the reader chooses.
// A plain script in the head, so that no page flashes in the wrong light.

(() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("octavo-theme");
    } catch {
      return null; // a browser that stores nothing
    }
  };
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new Event("themechange"));
  };
  const asSystem = () => (system.matches ? "dark" : "light");
  set(chosen() ?? asSystem());
  system.addEventListener("change", () => chosen() ?? set(asSystem()));
  window.switchTheme = () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    set(theme);
    try {
      localStorage.setItem("octavo-theme", theme);
    } catch {
      // It holds until the page is left.
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", window.switchTheme);
  });
})();
