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
  cases.forEach((one, place) => { one.dataset.place = place; });
  const plain = (text) => text.normalize("NFKC").toLowerCase();
  const value = (name) => form.elements[name].value;
  const texts = new Map();
  const textOf = (one, model) => {
    const cells = model === "" ? "tbody td" : `tbody td[data-m="${model}"]`;
    const key = one.dataset.place + " " + model;
    if (!texts.has(key)) {
      const parts = one.querySelectorAll(`.input, .gold, tbody th, ${cells}`);
      texts.set(key, plain([one.dataset.task, ...Array.from(parts, (part) => part.textContent)].join("\n")));
    }
    return texts.get(key);
  };
  const names = new Map(Array.from(form.elements.agreement.options, (option) => [option.value, option.text]));
  const crOf = (one) => {
    const cr = Number(one.dataset.crs.split(" ").at(value("model") || -1));
    return Number.isNaN(cr) ? 2 : cr;
  };
  const summarise = (one, model) => {
    const [moved, outcome] = [one.querySelector(".moved"), one.querySelector(".outcome")];
    one.dataset.moved ??= moved.textContent;
    const right = `${one.dataset.rights.split(" ")[model]} of ${one.dataset.wordings} right`;
    const cr = crOf(one);
    moved.textContent = model === "" ? one.dataset.moved : cr > 1 ? right : `CR ${cr.toFixed(2)} · ${right}`;
    outcome.textContent = names.get(one.dataset.outcomes.at(model || -1));
  };
  const orders = {
    chosen: (a, b) => a.dataset.place - b.dataset.place,
    change: (a, b) => b.dataset.change - a.dataset.change,
    least: (a, b) => crOf(a) - crOf(b),
    task: (a, b) => a.dataset.task.localeCompare(b.dataset.task),
  };
  let sorted = "chosen ";
  const apply = () => {
    const words = plain(value("search")).split(/\s+/).filter(Boolean);
    const [task, model, outcome] = [value("task"), value("model"), value("agreement")];
    let shown = 0;
    for (const one of cases) {
      const outcomes = model === "" ? one.dataset.outcomes : one.dataset.outcomes[Number(model)];
      const fits = (task === "" || one.dataset.task === task)
        && (outcome === "" || outcomes.includes(outcome))
        && (words.length === 0 || words.every((word) => textOf(one, model).includes(word)));
      summarise(one, model);
      one.hidden = !fits;
      shown += fits;
    }
    list.dataset.model = model;
    const order = `${value("order")} ${model}`;
    if (order !== sorted) {  // what moves under a pressed mouse button is not clicked
      list.append(...cases.slice().sort(orders[value("order")]));
      sorted = order;
    }
    count.textContent = `${shown} of ${cases.length} inputs`;
    nothing.hidden = shown > 0;
  };
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 80); });
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply, 0));
  form.hidden = false;
  apply();
})();
