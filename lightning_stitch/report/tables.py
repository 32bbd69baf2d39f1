"""Tables of a comparison and of a search's candidates: on the console, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from lightning_stitch.report.evaluation import METRICS, Evaluation, score
from lightning_stitch.report.verdicts import Verdict
from lightning_stitch.search import SearchResult
from lightning_stitch.tables import TESTED, Record, print_table, with_interval, write_csv, write_records

_EXPENDABLE = ("labels", "balanced accuracy", "seconds", "CKA")  # in a narrow terminal, what is missed least first


def comparison_table(
    evaluations: Sequence[Evaluation], targets: Tensor, *, num_resamples: int = 1000, seed: int = 0
) -> list[Record]:
    """One flat row per network, of plain strings, numbers and None.

    It has the name, kind, sources and budgets, `score`, the costs, and a verdict: None, for whoever judges to fill in.

    Raises:
        StitchError: If targets and probabilities do not fit each other.
    """
    return [
        {
            "name": e.name,
            "kind": e.kind,
            "sources": " + ".join(e.sources),
            "budget": e.budget,
            **score(e, targets, num_resamples=num_resamples, seed=seed),
            "params": e.params,
            "macs": e.macs,
            "mean_macs": e.mean_macs,
            "seconds": e.seconds,
            "labels": e.labels,
            "cka_product": e.cka_product,
            "verdict": None,
        }
        for e in evaluations
    ]


def print_comparison(rows: Sequence[Record], words: str, *, title: str, console: Console | None = None) -> None:
    """Print the rows of `comparison_table` and the verdict, to standard output where no console is named.

    The column CKA is the product of the CKAs; an empty column is left out.

    Raises:
        StitchError: If there are no rows.
    """
    cells = [_cells(row) for row in rows]
    shown = [column for column in (cells[0] if cells else ()) if any(row[column] != "-" for row in cells)]
    lines = [{column: row[column] for column in shown} for row in cells]
    expendable = [column for column in _EXPENDABLE if column in shown]
    notes: list[str | Text] = ["", Text(words), "", Text(TESTED)]
    print_table(lines, title=title, notes=notes, expendable=expendable, console=console)


def write_comparison(
    rows: Sequence[Record],
    words: str,
    directory: str | Path,
    *,
    verdicts: Sequence[Verdict] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write `comparison.csv` and `comparison.json` in a directory; returns their paths.

    The JSON file has the words as "verdict", each verdict's figures as "verdicts", and the settings of the run.

    The directory is made if it does not exist; files that are there are replaced.

    Raises:
        StitchError: As `write_records`.
    """
    about = {"verdict": words, "verdicts": [v.record() for v in verdicts], "settings": dict(settings or {})}
    return write_records(rows, Path(directory) / "comparison", **about)


def _cells(row: Record) -> dict[str, str]:
    # Under the name what it does not say.
    about = [row["kind"], row["sources"], row["budget"]]
    return {
        "network": "\n ".join(dict.fromkeys(filter(None, [row["name"], *about]))),
        **{metric.replace("_", " ").replace("auroc", "AUROC"): with_interval(row, metric) for metric in METRICS},
        "M params": f"{row['params'] / 1e6:.2f}",
        "M MACs": _macs_in_words(row),
        "seconds": f"{row['seconds']:.1f}",
        "labels": str(row["labels"]),
        "CKA": "-" if row["cka_product"] is None else f"{row['cka_product']:.3f}",
    }


def _macs_in_words(row: Record) -> str:
    most = f"{row['macs'] / 1e6:.1f}"
    return most if row["mean_macs"] is None else f"mean {row['mean_macs'] / 1e6:.1f}\nmost {most}"


def write_candidates(result: SearchResult, directory: str | Path) -> Path:
    """Write `candidates.csv` of the result's records in a directory, replacing one that is there; returns its path."""
    return write_csv(result.to_records(), Path(directory) / "candidates.csv")
