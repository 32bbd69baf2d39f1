"""The table of methods: each with its figures on the test images, and with everything that it took."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from lightning_stitch.tables import Record, print_table, with_interval

COUNTED = (
    "Seconds and FLOPs are of everything from loaded sources to the finished classifier. All methods on a source count "
    "the choice of it: one pass of every source over the train and selection images, and a head on each. Trained ones "
    "count every epoch, forward and backward, and a pass over the selection images, for every learning rate tried. "
    "All depths, early exit, smaller image, side by side and StitchNet are of one search; each counts all of it "
    "(cutting, calibration, CKAs, solves, ranking) and the head; what is fine-tuned counts what it starts from. "
    "Loading the sources, test images and measuring latency count for none. Labels are those of the train and "
    "selection images; what a search gives has those of the calibration images besides. "
    "Test images choose nothing."
)


def print_methods(rows: Sequence[Record], *, title: str, console: Console | None = None) -> None:
    """Print the rows of `compare_methods`, their verdicts and what is counted.

    To standard output where no console is named.

    Raises:
        StitchError: If there are no rows.
    """
    cells = [
        {
            "method": f"{row['method']}\n {row['network']}" + "\n over the search's budget" * row["over_budget"],
            "accuracy": with_interval(row, "accuracy"),
            "AUROC": with_interval(row, "auroc"),
            "seconds": f"{row['seconds']:.1f}",
            "TFLOPs": f"{row['flops'] / 1e12:.3g}",
            "labels": str(row["labels"]),
            "M params": f"{row['params'] / 1e6:.2f}",
            "M MACs": f"{row['macs'] / 1e6:.1f}",
            "ms": f"{row['latency_ms']:.1f}",
        }
        for row in rows
    ]
    verdicts = [Text(row["verdict"]) for row in rows if row["verdict"] is not None]
    print_table(cells, title=title, notes=["", *verdicts, Text(COUNTED)], console=console)
