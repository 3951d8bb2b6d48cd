"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null; // null follows the system
  const recall = () => { try { return localStorage.getItem("fedfuse-theme"); } catch { return null; } };
  const keep = (name) => { try { localStorage.setItem("fedfuse-theme", name); } catch { /* a file may have no storage */ } };
  const button = document.getElementById("theme");
  const paint = () => {
    const name = chosen || (dark.matches ? "dark" : "light");
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light page" : "Dark page";
  };
  const known = recall();
  if (known === "dark" || known === "light") chosen = known;
  dark.addEventListener("change", paint);
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    keep(chosen);
    paint();
  });
  paint();

  const value = (row, column) => {
    const raw = row.cells[column].dataset.v;
    const number = Number(raw);
    return raw === "" ? null : Number.isNaN(number) ? raw : number;
  };
  const sort = (header, direction) => {
    const table = header.closest("table");
    const column = header.cellIndex;
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return direction === "ascending" ? order : -order;
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    table.tBodies[0].append(...rows);
  };
  document.addEventListener("click", (event) => {
    const pressed = event.target.closest("button");
    if (!pressed) return;
    const header = pressed.closest("th");
    if (header) {
      const now = header.getAttribute("aria-sort");
      const first = header.classList.contains("word") ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      sort(header, now === first ? second : first);
    } else if (pressed.dataset.series) {
      const section = pressed.closest("section");
      const on = pressed.getAttribute("aria-pressed") !== "true";
      for (const other of section.querySelectorAll("button[data-series]")) other.setAttribute("aria-pressed", "false");
      pressed.setAttribute("aria-pressed", String(on));
      section.classList.toggle("lit", on);
      const name = `series-${pressed.dataset.series}`;
      for (const part of section.querySelectorAll(".series")) part.classList.toggle("on", on && part.classList.contains(name));
    }
  });
  const closed = [];
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; closed.push(part); }
  });
  addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
})();
