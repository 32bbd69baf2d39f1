from __future__ import annotations

import csv
import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from lightning_stitch.errors import StitchError
from lightning_stitch.tables import csv_text, print_table, table_text, with_interval, write_csv, write_records

ROWS = [
    {"network": "resnet[50]", "licence": "mit", "M MACs": "4.1", "M params": "25.56"},
    {"network": "a_network_with_a_long_name", "licence": "-", "M MACs": "15500.0", "M params": "138.36"},
]
RECORDS = [{"name": "naïve, new", "accuracy": 0.5, "budget": None}, {"name": "b", "accuracy": 1.0, "budget": "x"}]


def on_a_terminal(width: int, **options: object) -> list[str]:
    file = StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    print_table(ROWS, title="Two [networks]", console=console, **options)  # type: ignore[arg-type]
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_text_is_set_left_numbers_right_and_nothing_is_markup() -> None:
    assert on_a_terminal(80, left=["licence"]) == [
        "Two [networks]",
        "network                     licence   M MACs  M params",
        "resnet[50]                  mit          4.1     25.56",
        "a_network_with_a_long_name  -        15500.0    138.36",
    ]


def test_a_pipe_gets_whole_lines_without_blanks_at_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "path": "fragment -> " * 40} for row in ROWS]
    note = "pip install lightning-stitch " * 9
    print_table(rows, title="Two", notes=[note, Text("prose")])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 3 + 2
    assert printed == [line.rstrip() for line in printed]
    assert printed[-2:] == [note.rstrip(), "prose"]
    assert table_text(rows, title="Two", notes=[note, Text("prose")]).splitlines() == printed


def test_a_narrow_terminal_is_spared_expendable_columns_and_then_folds() -> None:
    expendable = ["M params", "licence"]
    assert on_a_terminal(56, expendable=expendable)[1].split()[-1] == "params"
    assert on_a_terminal(46, expendable=expendable)[1].split() == ["network", "licence", "M", "MACs"]
    assert on_a_terminal(40, expendable=expendable)[1].split() == ["network", "M", "MACs"]
    folded = on_a_terminal(24, expendable=expendable)
    assert max(map(len, folded)) <= 24
    assert "".join(line.split()[0] for line in folded[3:]) == ROWS[1]["network"]


def test_on_a_terminal_prose_is_wrapped_and_commands_are_not() -> None:
    words = "word " * 20
    lines = on_a_terminal(60, notes=[words, Text(words)])
    assert words.rstrip() in lines
    assert max(len(line) for line in lines if line != words.rstrip()) <= 60


def test_an_interval_stands_behind_its_metric() -> None:
    record = {"accuracy": 0.9123, "accuracy_low": 0.88, "accuracy_high": 0.944, "auroc": None}
    assert with_interval(record, "accuracy") == "0.912 +- 0.032"
    assert with_interval(record, "auroc") == "-"


def test_csv_is_read_back_and_none_is_an_empty_field(tmp_path: Path) -> None:
    path = write_csv(RECORDS, tmp_path / "new" / "folder" / "a.csv")
    assert path.read_bytes().decode() == csv_text(RECORDS)
    with path.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{key: "" if value is None else str(value) for key, value in row.items()} for row in RECORDS]
    assert csv_text([]) == "\n"


def test_records_are_written_twice_and_replace_older_ones(tmp_path: Path) -> None:
    write_records(RECORDS, tmp_path / "version_0.1" / "methods", seed=3)
    table, record = write_records(RECORDS[:1], tmp_path / "version_0.1" / "methods", seed=4)
    assert (table.name, record.name) == ("methods.csv", "methods.json")
    assert table.read_text(encoding="utf-8") == csv_text(RECORDS[:1])
    assert json.loads(record.read_text()) == {"seed": 4, "rows": RECORDS[:1]}


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for value in (math.nan, object()):
        with pytest.raises(StitchError, match="plain JSON values, without NaN"):
            write_records([{"value": value}], tmp_path / "new" / "methods")
    for show in (write_records, write_csv, lambda rows, path: print_table(rows, title="")):
        with pytest.raises(StitchError, match="no rows to show"):
            show([], tmp_path / "new" / "methods")  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
