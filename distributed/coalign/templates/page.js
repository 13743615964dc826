"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let stored = "system";
  try { stored = localStorage.getItem("coalign-theme") || stored; } catch (error) { /* a file may have no storage */ }
  const show = (theme) => {
    if (theme === "system") { delete root.dataset.theme; } else { root.dataset.theme = theme; }
    button.dataset.now = theme;
    button.textContent = "Theme: " + theme;
  };
  show(themes.includes(stored) ? stored : "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(button.dataset.now) + 1) % themes.length];
    show(next);
    try { localStorage.setItem("coalign-theme", next); } catch (error) { /* the choice lasts for this page */ }
  });

  let opened = [];
  window.addEventListener("beforeprint", () => {
    const cases = Array.from(document.querySelectorAll("details.case:not([hidden])")).slice(0, 30);
    const others = Array.from(document.querySelectorAll("details:not(.case)"));
    opened = opened.concat([...others, ...cases].filter((one) => !one.open));
    for (const one of opened) { one.open = true; }
  });
  window.addEventListener("afterprint", () => {
    for (const one of opened) { one.open = false; }
    opened = [];
  });

  const list = document.getElementById("cases");
  if (!list) { return; }
  const form = document.getElementById("filter");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  const cases = Array.from(list.querySelectorAll("details.case"));
  const plain = (text) => text.normalize("NFKC").toLowerCase();
  const texts = new Map();
  const textOf = (one) => {
    if (!texts.has(one)) { texts.set(one, plain(one.textContent)); }
    return texts.get(one);
  };
  const value = (name) => form.elements[name].value;
  const orders = {
    chosen: (a, b) => cases.indexOf(a) - cases.indexOf(b),
    change: (a, b) => b.dataset.change - a.dataset.change,
    least: (a, b) => a.dataset.cr - b.dataset.cr,
    task: (a, b) => a.dataset.task.localeCompare(b.dataset.task),
  };
  const apply = () => {
    const words = plain(value("search")).split(/\s+/).filter(Boolean);
    const [task, model, outcome] = [value("task"), value("model"), value("agreement")];
    let shown = 0;
    for (const one of cases) {
      const outcomes = model === "" ? one.dataset.outcomes : one.dataset.outcomes[Number(model)];
      const fits = (task === "" || one.dataset.task === task)
        && (outcome === "" || outcomes.includes(outcome))
        && (words.length === 0 || words.every((word) => textOf(one).includes(word)));
      one.hidden = !fits;
      shown += fits;
    }
    list.dataset.model = model;
    count.textContent = `${shown} of ${cases.length} inputs`;
    nothing.hidden = shown > 0;
  };
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 80); });
  form.elements.order.addEventListener("change", () => {
    list.append(...cases.slice().sort(orders[value("order")]));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { apply(); list.append(...cases); }, 0));
  form.hidden = false;
  apply();
})();
