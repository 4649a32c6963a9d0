"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // Rows by a column: numbers as such, what is empty last; once more turns the order round.
  const order = new Intl.Collator(undefined, { numeric: true });
  const sort = (table, column, head) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const key = (row) => row.cells[column].dataset.key ?? "";
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const [x, y] = [Number(a), Number(b)];
      const found = Number.isNaN(x) || Number.isNaN(y) ? order.compare(a, b) : x - y;
      return up ? found : -found;
    };
    all("th", head.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  };
  all("table.sortable").forEach((table) =>
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => sort(table, column, head));
      head.replaceChildren(button);
    }),
  );

  // Rows and methods that have all words of the filter.
  const input = document.getElementById("filter");
  const rows = all("table.sortable tbody tr, details.run");
  const texts = new Map(rows.map((row) => [row, (row.matches("tr") ? row : row.querySelector("summary")).textContent.toLowerCase()]));
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => { row.hidden = !words.every((word) => texts.get(row).includes(word)); });
    const shown = rows.filter((row) => row.matches("tr") && !row.hidden).length;
    document.getElementById("filtered").textContent = words.length ? `${shown} rows` : "";
  };
  input.addEventListener("input", filter);

  // Light or dark: the reader's choice is kept where the browser lets a page keep something.
  const button = document.getElementById("theme");
  const kept = (value) => {
    try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; }
  };
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const show = (theme) => {
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(dark()));
  };
  button.addEventListener("click", () => { const theme = dark() ? "light" : "dark"; show(theme); kept(theme); });
  show(kept());

  // A link to a method opens it, whatever the filter hides.
  const open = () => {
    const target = document.querySelector("details:target");
    if (!target) return;
    if (target.hidden) { input.value = ""; filter(); }
    target.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  addEventListener("load", open); // before that nothing is a target
  addEventListener("click", (event) => { // of the link to where we are, which changes no hash
    const link = event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) open();
  });

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => { closed = all("details:not([open])"); closed.forEach((one) => { one.open = true; }); });
  addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));

  document.querySelector(".controls").hidden = false;
})();
