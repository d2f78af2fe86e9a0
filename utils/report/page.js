"use strict";
// Sort a table by the column whose head is pressed; again turns the order. Cells carry their full value; what is absent stays last.
function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value === "" ? null : Number(cell.dataset.value);
}
function compare(one, other, sign) {
  if (one === null || other === null) return (one === null) - (other === null);
  return sign * (typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other)));
}
function sort(head) {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const body = head.closest("table").tBodies[0];
  const rows = Array.from(body.rows);
  rows.sort((one, other) => compare(valueOf(one, head.cellIndex), valueOf(other, head.cellIndex), sign));
  for (const each of head.parentNode.cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  body.append(...rows);
}
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button.closest("th")));
