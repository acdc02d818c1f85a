"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const sections = all(".board");
  const pick = document.getElementById("pick");

  // Boards ------------------------------------------------------------------------------------------------------------
  function open(name) {
    const wanted = sections.find((section) => section.id === name) || sections[0];
    if (!wanted) return;
    for (const section of sections) section.classList.toggle("open", section === wanted);
    for (const link of all("a[data-board]")) {
      if (link.dataset.board === wanted.id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    pick.value = wanted.id;
    document.title = `${wanted.id} · certbench leaderboards`;
  }
  const asked = () => decodeURIComponent(location.hash.slice(1));
  pick.addEventListener("change", () => { location.hash = pick.value; });
  addEventListener("hashchange", () => {
    if (asked() === "main") return;
    open(asked());
    scrollTo(0, 0);
  });
  open(asked());

  // Sorting: a row, its published figures and its details are one tbody, so they move together ------------------------
  const key = (entry, column) => {
    const cell = entry.rows[0].cells[column];
    return cell.dataset.sort ?? cell.textContent.trim();
  };
  function compare(one, other, falls) {
    if (one === "" || other === "") return (one === "") - (other === ""); // what is unknown stands last, either way
    const numbers = [Number(one), Number(other)];
    const order = numbers.some(Number.isNaN) ? one.localeCompare(other, "en") : numbers[0] - numbers[1];
    return falls ? -order : order;
  }
  function sort(table, column, falls) {
    const entries = all("tbody.entry", table);
    entries.sort((a, b) => compare(key(a, column), key(b, column), falls));
    table.append(...entries);
    all("thead th", table).forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    tell(table.closest(".board"), `sorted by ${name(table, column)}, ${falls ? "descending" : "ascending"}`);
  }
  const name = (table, column) => table.tHead.rows[0].cells[column].textContent.trim();
  const rises = (head) => head.classList.contains("text") || /rank|train|certify|draws/.test(head.textContent);
  for (const button of all("thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const now = head.getAttribute("aria-sort");
      sort(head.closest("table"), Number(button.dataset.column), now ? now === "ascending" : !rises(head));
    });
  }
  for (const choice of all("select.sort")) {
    choice.addEventListener("change", () => {
      const table = choice.closest(".board").querySelector("table");
      const column = Number(choice.value);
      sort(table, column, !rises(table.tHead.rows[0].cells[column]));
    });
  }

  // Filtering: words, and conditions on columns such as certified>90 ---------------------------------------------------
  const tests = {
    ">": (a, b) => a > b, "<": (a, b) => a < b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b, "=": (a, b) => a === b,
  };
  function condition(term, table) {
    const found = /^([a-zδ%.0-9 ]+?)(>=|<=|>|<|=)(-?[0-9.]+)$/i.exec(term);
    if (!found) return (entry) => entry.rows[0].textContent.toLowerCase().includes(term);
    const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent.trim().toLowerCase());
    const column = heads.findIndex((head) => head.startsWith(found[1].trim()));
    if (column < 0) return () => false;
    return (entry) => {
      const value = key(entry, column);
      return value !== "" && tests[found[2]](Number(value), Number(found[3]));
    };
  }
  function filter(board) {
    const table = board.querySelector("table");
    const terms = board.querySelector(".filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = terms.map((term) => condition(term, table));
    const boxes = all(".kind", board);
    const kinds = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const entries = all("tbody.entry", table);
    for (const entry of entries) {
      const kept = (!boxes.length || kinds.has(entry.dataset.kind)) && wanted.every((test) => test(entry));
      entry.hidden = !kept;
    }
    tell(board, "");
  }
  function tell(board, words) {
    const entries = all("tbody.entry", board.querySelector("table"));
    const shown = entries.filter((entry) => !entry.hidden).length;
    const said = board.querySelector(".said");
    if (said) said.textContent = [`${shown} of ${entries.length} rows`, words].filter(Boolean).join(", ");
  }
  for (const form of all("form.controls")) {
    const board = form.closest(".board");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => { if (!event.target.matches("select")) filter(board); });
  }

  // Details, copying, theme --------------------------------------------------------------------------------------------
  for (const button of all(".unfold")) {
    button.addEventListener("click", () => {
      const details = document.getElementById(button.getAttribute("aria-controls"));
      details.hidden = !details.hidden;
      button.setAttribute("aria-expanded", String(!details.hidden));
    });
  }
  async function copy(button) {
    const text = button.parentElement.nextElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  for (const button of all(".copy")) button.addEventListener("click", () => copy(button));

  const theme = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("certbench-theme", value);
      return localStorage.getItem("certbench-theme");
    } catch { return value; } // a browser may keep nothing for files
  };
  function paint(value) {
    root.dataset.theme = value;
    theme.textContent = `Theme: ${value}`;
  }
  paint(themes.includes(remembered()) ? remembered() : "auto");
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
    remembered(next);
    paint(next);
  });
})();
