"use strict";
const keyOf = (cell) => ("key" in cell.dataset ? cell.dataset.key : cell.textContent);
const compare = (one, other) => {
  const [a, b] = [Number(one), Number(other)];
  return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other, undefined, { numeric: true }) : a - b;
};
for (const table of document.querySelectorAll("table.sorts")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row.cells[column]), row]);
    rows.sort(([one], [other]) => (one === "" || other === "" ? (one === "") - (other === "") : compare(one, other) * (down ? -1 : 1)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
for (const part of document.querySelectorAll(".filters")) {
  const [input, output, rows] = [part.querySelector("input"), part.querySelector("output"), [...part.querySelector("tbody").rows]];
  const show = () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  input.addEventListener("input", show);
  show();
}
