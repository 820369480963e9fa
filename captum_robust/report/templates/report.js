"use strict";
// The page is whole without this script, which adds sorting, filters and sliders to it.

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, at) => {
    const data = row.cells[at].querySelector("data");
    const text = row.cells[at].textContent.trim();
    return data ? Number(data.value) : text === "–" ? null : text;
  };
  const order = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => row.cells.length > 1);
        const known = rows.filter((row) => value(row, at) !== null);
        known.sort((a, b) => sign * order(value(a, at), value(b, at)));
        body.append(...known, ...rows.filter((row) => value(row, at) === null));
      }
    });
  });
}

function filtered(tools) {
  const [words, block, count] = ["input", "select", "output"].map((n) => tools.querySelector(n));
  const table = tools.parentElement.querySelector("table");
  const apply = () => {
    let seen = 0;
    [...table.tBodies].forEach((body, number) => {
      const wanted = !block || block.value === "" || Number(block.value) === number;
      let left = 0;
      for (const row of body.rows) {
        if (row.cells.length === 1) continue;
        const name = row.cells[0].textContent.toLowerCase();
        row.hidden = !name.includes(words.value.trim().toLowerCase());
        left += row.hidden ? 0 : 1;
      }
      body.hidden = !wanted || left === 0;
      seen += body.hidden ? 0 : left;
    });
    count.textContent = `${seen} rows`;
  };
  [words, block].forEach((input) => input && input.addEventListener("input", apply));
  tools.hidden = false;
}

function slider(shot) {
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: 0, max: 100, value: 50 });
  input.setAttribute("aria-label", `From clean to attacked: ${shot.dataset.image}`);
  const show = () => {
    shot.style.setProperty("--cut", `${100 - input.value}%`);
    input.setAttribute("aria-valuetext", `${input.value} % of the attacked image`);
  };
  input.addEventListener("input", show);
  shot.querySelector(".stage").after(input);
  shot.classList.add("slides");
  show();
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".tools").forEach(filtered);
document.querySelectorAll(".versus").forEach(slider);
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details.printed").forEach((one) => (one.open = true));
});
