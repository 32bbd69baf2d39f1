from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from lightning_stitch.baselines import table as method_plot
from lightning_stitch.baselines.table import COUNTED, plot_methods, print_methods, write_methods
from lightning_stitch.errors import StitchError


def row(method: str, *, accuracy: float = 0.8, flops: int = 10**12, labels: int = 32, **changes: Any) -> dict[str, Any]:
    interval = {f"{m}{end}": accuracy for m in ("accuracy", "auroc") for end in ("", "_low", "_high")}
    costs = {"seconds": 12.34, "cpu_seconds": 11.0, "params": 3_400_000, "macs": 125_400_000, "latency_ms": 5.5}
    return {"method": method, "network": "resnet", **interval, **costs, "flops": flops, "labels": labels, **changes}


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_methods(rows, title="Test images", console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_printed_table_has_every_figure_and_says_what_is_counted() -> None:
    text = printed([row("linear probe"), row("StitchNet", flops=2_340_000_000, auroc=None)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "linear probe 0.800 [0.80, 0.80] 0.800 [0.80, 0.80] 12.3 1 32 3.40 125.4 5.5" in lines
    assert "StitchNet 0.800 [0.80, 0.80] - 12.3 0.00234 32 3.40 125.4 5.5" in lines
    assert lines[3] == "resnet"
    assert COUNTED in " ".join(lines)


def test_files_hold_the_rows_and_the_settings_and_replace_older_ones(tmp_path: Path) -> None:
    rows = [row("linear probe"), row("StitchNet", note=None)]
    rows = [{**r, "note": r.get("note")} for r in rows]
    write_methods(rows[:1], tmp_path / "new", settings={"seed": 3})
    table, record = write_methods(rows, tmp_path / "new", settings={"seed": 3})
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert found == [{name: "" if value is None else str(value) for name, value in r.items()} for r in rows]
    assert json.loads(record.read_text()) == {"counted": COUNTED, "settings": {"seed": 3}, "rows": rows}


def drawn(rows: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure behind a file."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    assert plot_methods(rows, path) == path
    (figure,) = figures
    return figure


def test_a_point_is_a_methods_mean_over_seeds_with_its_spread_in_the_panel_of_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row("linear probe", accuracy=0.7, flops=100),
        row("linear probe", accuracy=0.9, flops=300),
        row("StitchNet", accuracy=0.6, flops=1000),
        row("linear probe", accuracy=0.95, flops=5000, labels=128),
    ]
    figure = drawn(rows, tmp_path / "methods.png", monkeypatch)
    few, many = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["32 labels", "128 labels"]
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert few.get_ylabel() == "test accuracy"
    probe, stitched = few.containers
    (other,) = many.containers
    assert isinstance(probe, ErrorbarContainer)
    assert probe.lines[0].get_xydata().tolist() == [[200, pytest.approx(0.8)]]
    assert stitched.lines[0].get_xydata().tolist() == [[1000, 0.6]]
    ends = probe.lines[2][1].get_segments()[0][:, 1].tolist()
    assert ends == pytest.approx([0.8 - 0.02**0.5, 0.8 + 0.02**0.5])
    assert (probe.lines[0].get_color(), probe.lines[0].get_marker()) == (
        other.lines[0].get_color(),
        other.lines[0].get_marker(),
    )
    assert probe.lines[0].get_color() != stitched.lines[0].get_color()
    assert probe.lines[0].get_marker() != stitched.lines[0].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["linear probe", "StitchNet"]
    with Image.open(tmp_path / "methods.png") as image:
        assert image.width > 600


def test_points_of_nearly_the_same_cost_are_drawn_close_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("linear probe", flops=10**9), row("StitchNet", flops=10**9 + 10**6)]
    figure = drawn(rows, tmp_path / "methods.png", monkeypatch)
    low, high = figure.axes[0].get_xlim()
    assert high >= 10 * low
    assert low < 10**9 < high


def test_a_method_missing_from_the_last_panel_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("linear probe"), row("StitchNet"), row("StitchNet", labels=128)]
    figure = drawn(rows, tmp_path / "methods.png", monkeypatch)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["linear probe", "StitchNet"]


def test_without_rows_there_is_nothing_to_show(tmp_path: Path) -> None:
    for show in (
        lambda: printed([]),
        lambda: write_methods([], tmp_path),
        lambda: plot_methods([], tmp_path / "a.png"),
    ):
        with pytest.raises(StitchError, match="There are no rows to"):
            show()
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(method_plot, "find_spec", lambda name: None)
    with pytest.raises(StitchError, match=r"pip install 'lightning-stitch\[plots\]', or plot=False"):
        plot_methods([row("StitchNet")], tmp_path / "a.png")
