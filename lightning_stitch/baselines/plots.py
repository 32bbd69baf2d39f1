"""A figure of methods: test accuracy against what training took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_stitch.errors import StitchError
from lightning_stitch.tables import Record

# Okabe and Ito's colours, told apart by the colour-blind; the marker says the same once more.
_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "*", "P", "X")


def check_can_plot() -> None:
    """Refuse, with a StitchError, to go on without matplotlib."""
    if find_spec("matplotlib") is None:
        raise StitchError("The plot needs matplotlib: pip install 'lightning-stitch[plots]', or plot=False.")


def plot_methods(rows: Sequence[Record], path: str | Path) -> Path:
    """Draw test accuracy against training FLOPs, on a logarithmic axis, of rows of `compare_methods`.

    Several rows of one method and number of labels (other seeds, other runs) make one point, their mean, with bars of
    one standard deviation of both. The ending of the path, which is returned, says which kind of image it becomes.

    Raises:
        StitchError: If there are no rows, or matplotlib is not installed.
    """
    if not rows:
        raise StitchError("There are no rows to draw; `compare_methods` makes them.")
    check_can_plot()
    # Not pyplot, which would choose a window system and keep the figure.
    figure: Any = import_module("matplotlib.figure").Figure(
        figsize=(2.2 + 3.4 * len({row["labels"] for row in rows}), 4.6), layout="constrained"
    )
    counts = sorted({row["labels"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = figure.subplots(1, len(counts), sharex=True, sharey=True, squeeze=False)[0]
    # More than a decade, or points of nearly the same cost would seem far apart.
    low, high = min(row["flops"] for row in rows), max(row["flops"] for row in rows)
    wider = max(1.5, math.sqrt(30 * low / high))
    panels[0].set_xscale("log")  # of all, which share it
    panels[0].xaxis.set_major_formatter(import_module("matplotlib.ticker").LogFormatter())
    panels[0].set_xlim(low / wider, high * wider)
    for axes, labels in zip(panels, counts, strict=True):
        for index, method in enumerate(methods):
            runs = [row for row in rows if (row["method"], row["labels"]) == (method, labels)]
            if not runs:
                continue
            flops, spread = _mean_and_spread([row["flops"] for row in runs])
            accuracy, noise = _mean_and_spread([row["accuracy"] for row in runs])
            axes.errorbar(
                flops,
                accuracy,
                xerr=spread,
                yerr=noise,
                label=method,
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=9,
                linestyle="none",
                capsize=3,
            )
        axes.set_title(f"{labels} labels")
        axes.set_xlabel("training FLOPs, choices included")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    points = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [points[method] for method in methods],
        methods,
        loc="outside lower center",
        ncols=4 if len(counts) > 1 else 2,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    return Path(path)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; a single value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
