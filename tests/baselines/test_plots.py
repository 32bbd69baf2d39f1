from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doubles.methods import row_of as row
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from lightning_stitch.baselines import plots
from lightning_stitch.baselines.plots import plot_methods
from lightning_stitch.errors import StitchError


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


def test_without_rows_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="There are no rows to draw"):
        plot_methods([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(StitchError, match=r"pip install 'lightning-stitch\[plots\]', or plot=False"):
        plot_methods([row("StitchNet")], tmp_path / "a.png")
