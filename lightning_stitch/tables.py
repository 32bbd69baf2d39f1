"""Tables: rows of text on a console, records in CSV and JSON files."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_stitch.errors import StitchError

Record = dict[str, Any]
Cells = Mapping[str, str]

TESTED = (
    "+- and brackets are 95 % intervals, points are of accuracy. Better and worse are so by the exact McNemar test, "
    "equivalent by two one-sided tests, at 5 %."
)
"""What stands under a comparison, on the console and in a card."""

# In characters.
_UNLIMITED = 10_000  # a pipe or a log has no width to go by
_GAP = 2  # between columns; 1 where room is short
_LEAST_NAME = 12


def print_table(
    rows: Sequence[Cells],
    *,
    title: str,
    notes: Sequence[str | Text] = (),
    left: Collection[str] = (),
    expendable: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table: on a terminal in its width, in a pipe or a file as wide as it is, without blanks at the ends.

    Args:
        rows: The text of each cell by its column; all rows have the same columns.
        title: The line above.
        notes: What stands below. A `str` stays one line, for it may hold a command to copy; a `Text` is wrapped.
        left: Columns that are set left, besides the first; the others are set right.
        expendable: Columns that a narrow terminal leaves out, what is missed least first. What is still too wide is
            folded.
        console: Where to; None: standard output.

    Raises:
        StitchError: If there are no rows.
    """
    console = console or Console()
    if console.is_terminal:
        _render(rows, console, title, notes, left, expendable)
    else:
        print(table_text(rows, title=title, notes=notes, left=left), file=console.file)


def table_text(
    rows: Sequence[Cells], *, title: str, notes: Sequence[str | Text] = (), left: Collection[str] = ()
) -> str:
    """What `print_table` prints into a pipe."""
    text = StringIO()
    _render(rows, Console(file=text, width=_UNLIMITED, force_terminal=False), title, notes, left, ())
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _render(
    rows: Sequence[Cells],
    console: Console,
    title: str,
    notes: Sequence[str | Text],
    left: Collection[str],
    expendable: Sequence[str],
) -> None:
    _require(rows)
    # The title goes before the table, which would fold it to its own width.
    console.print(title, markup=False, highlight=False, soft_wrap=True, style="italic")
    columns = list(rows[0])
    widths = {
        column: max(cell_len(line) for text in _column(rows, column) for line in text.split("\n")) for column in columns
    }

    def width_of(some: Sequence[str], gap: int) -> int:
        return sum(widths[column] + gap for column in some)

    for column in expendable:
        if width_of(columns, _GAP) > console.width:
            columns.remove(column)
    gap = _GAP if width_of(columns, _GAP) <= console.width else 1
    numbers = [column for column in columns[1:] if column not in left]
    # Names are folded before numbers are, as long as something is left of them.
    are_whole = width_of(numbers, gap) + _LEAST_NAME <= console.width
    table = Table(box=None, padding=(0, gap, 0, 0))
    for column in columns:
        is_number = column in numbers
        table.add_column(
            column, justify="right" if is_number else "left", no_wrap=is_number and are_whole, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=isinstance(note, str))


def _column(rows: Sequence[Cells], column: str) -> list[str]:
    return [column, *(row[column] for row in rows)]


def with_interval(record: Record, metric: str) -> str:
    """A metric of a record with half the width of its interval, "0.912 +- 0.030"; "-" where it is undefined."""
    if record[metric] is None:
        return "-"
    return f"{record[metric]:.3f} +- {(record[f'{metric}_high'] - record[f'{metric}_low']) / 2:.3f}"


def csv_text(records: Sequence[Record]) -> str:
    """Records as CSV, with a header; None is an empty field."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_csv(records: Sequence[Record], path: str | Path) -> Path:
    """Write records as CSV, in a folder that is made if it does not exist; a file that is there is replaced.

    Raises:
        StitchError: If there are no records.
    """
    _require(records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(csv_text(records), encoding="utf-8", newline="")
    return path


def write_records(records: Sequence[Record], stem: str | Path, **about: Any) -> tuple[Path, Path]:
    """Write records as CSV, and as JSON with what they are about; returns the paths of the two files.

    Args:
        records: Flat mappings with the same keys, of plain JSON values.
        stem: The files without their endings, .csv and .json; the folder is made, files that are there are replaced.
        about: Further plain JSON values; the JSON file holds them beside "rows", the records.

    Raises:
        StitchError: If there are no records, or a value is not plain, finite JSON; nothing is written.
    """
    try:
        text = json.dumps({**about, "rows": list(records)}, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StitchError(f"Rows and settings must be plain JSON values, without NaN: {error}.") from error
    csv_path = write_csv(records, f"{stem}.csv")
    json_path = csv_path.with_suffix(".json")
    json_path.write_text(text + "\n", encoding="utf-8")
    return csv_path, json_path


def _require(rows: Sequence[Any]) -> None:
    if not rows:
        raise StitchError("There are no rows to show.")
