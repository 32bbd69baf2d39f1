// Sorts a table by a column: numbers by value, words by the alphabet; what is empty comes last either way.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const cell = button.parentElement, table = cell.closest("table"), place = cell.cellIndex;
  const down = cell.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  cell.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? y.localeCompare(x) : y - x;
    return down ? order : -order;
  });
  table.tBodies[0].append(...rows);
});
