"""The table of methods: each with its figures on the test images, and with everything that it took."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_stitch.errors import StitchError

Row = dict[str, Any]

COUNTED = (
    "Seconds and FLOPs are of everything from loaded sources to the finished classifier. All methods on a source count "
    "the choice of it: one pass of every source over the train and selection images, and a head on each. Trained ones "
    "count every epoch, forward, backward and the passes over the selection images, for every learning rate tried. "
    "StitchNet counts the whole search (cutting, calibration, CKAs, solves, ranking) and the head; what is fine-tuned "
    "counts what it starts from. Loading the sources, test images and measuring latency count for none. Labels are "
    "those of the train and selection images, which all methods use alike; test images choose nothing."
)
_WIDTH = 120


def print_methods(rows: Sequence[Row], *, title: str, console: Console | None = None) -> None:
    """Print the table and what is counted; 120 characters are wide enough.

    Args:
        rows: What `compare_methods` returned.
        title: Heading of the table.
        console: Where to print; None: standard output.

    Raises:
        StitchError: If there are no rows.
    """
    console = console or Console()
    if not console.is_terminal:
        # A file or a pipe has no width; rich would assume 80.
        console.width = max(console.width, _WIDTH)
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    cells = _cells(rows)
    for column in cells[0]:
        first = column == "method"
        table.add_column(column, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(Text(f"{line['method']}\n {row['network']}"), *list(line.values())[1:])
    console.print(table)
    console.print()
    console.print(Text(COUNTED))


def write_methods(
    rows: Sequence[Row], directory: str | Path, *, settings: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write `methods.csv` and `methods.json`, replacing those that are there.

    Args:
        rows: The rows so far.
        directory: Where to; made if it does not exist.
        settings: What the comparison was run with, as plain JSON values; it goes into the JSON file.

    Returns:
        The paths of the two files.

    Raises:
        StitchError: If there are no rows.
    """
    _require(rows)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, json_path = folder / "methods.csv", folder / "methods.json"
    record = {"counted": COUNTED, "settings": dict(settings or {}), "rows": list(rows)}
    json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with csv_path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return csv_path, json_path


def _require(rows: Sequence[Row]) -> None:
    if not rows:
        raise StitchError("There are no rows to show; `compare_methods` makes them.")


def _cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    _require(rows)
    return [
        {
            "method": row["method"],
            "accuracy": _with_interval(row, "accuracy"),
            "AUROC": _with_interval(row, "auroc"),
            "seconds": f"{row['seconds']:.1f}",
            "TFLOPs": f"{row['flops'] / 1e12:.3g}",
            "labels": str(row["labels"]),
            "M params": f"{row['params'] / 1e6:.2f}",
            "M MACs": f"{row['macs'] / 1e6:.1f}",
            "ms": f"{row['latency_ms']:.1f}",
        }
        for row in rows
    ]


def _with_interval(row: Row, metric: str) -> str:
    if row[metric] is None:
        return "-"
    return f"{row[metric]:.3f} [{row[f'{metric}_low']:.2f}, {row[f'{metric}_high']:.2f}]"


# Okabe and Ito's colours, told apart by the colour-blind; the marker says the same once more.
_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "*", "P", "X")


def check_can_plot() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        StitchError: If it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise StitchError("The plot needs matplotlib: pip install 'lightning-stitch[plots]', or plot=False.")


def plot_methods(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw test accuracy against training FLOPs, on a logarithmic axis.

    Several rows of one method and number of labels (other seeds) make one point, their mean, with bars of one standard
    deviation of both.

    Args:
        rows: What `compare_methods` returned, of one run or of several.
        path: The image file; its ending says which kind.

    Returns:
        The path.

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
    panels[0].set_xlim(low / wider, high * wider)
    for axes, labels in zip(panels, counts, strict=True):
        for index, method in enumerate(methods):
            found = [row for row in rows if (row["method"], row["labels"]) == (method, labels)]
            if not found:
                continue
            flops, spread = _mean_and_spread([row["flops"] for row in found])
            accuracy, noise = _mean_and_spread([row["accuracy"] for row in found])
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
