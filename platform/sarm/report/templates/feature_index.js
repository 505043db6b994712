"use strict";
(() => {
  const find = (selector) => document.querySelector(selector);
  const rows = [...document.querySelectorAll("tbody tr")];
  const body = find("tbody"), search = find("#search"), filter = find("#filter"), order = find("#order");
  let key = order.value, falling = true;
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const d = row.dataset;
      const fits = (!filter.value || d.sign === filter.value || (filter.value === "explained" && d.explained === "1"))
        && words.every((word) => d.search.includes(word));
      row.hidden = !fits;
      count += fits;
    }
    find("#shown").textContent = count + " of " + rows.length;
  };
  const sort = () => {
    const value = (row) => row.dataset[key] === "" ? -Infinity : Math.abs(Number(row.dataset[key]));
    const sign = falling ? -1 : 1;
    rows.sort((a, b) => sign * (value(a) - value(b)) || a.dataset.latent - b.dataset.latent);
    body.append(...rows);
    for (const head of document.querySelectorAll("th[data-key]")) {
      head.setAttribute("aria-sort", head.dataset.key !== key ? "none" : falling ? "descending" : "ascending");
    }
    order.value = key;
  };
  for (const head of document.querySelectorAll("th[data-key]")) {
    head.firstChild.addEventListener("click", () => {
      falling = head.dataset.key !== key || !falling;
      key = head.dataset.key;
      sort();
    });
  }
  search.addEventListener("input", show);
  filter.addEventListener("change", show);
  order.addEventListener("change", () => { key = order.value; falling = key !== "latent"; sort(); });
  find(".tools").hidden = false;
  key = "contribution";
  order.value = key;
  for (const head of document.querySelectorAll("th[data-key]")) {
    head.setAttribute("aria-sort", head.dataset.key === key ? "descending" : "none");
  }
  show();
})();
