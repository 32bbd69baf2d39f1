"""Tables of a comparison and of a search's candidates: on the console, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.report.evaluation import _METRICS, Evaluation, Row, score
from lightning_stitch.search import SearchResult

_WIDTH = 120


def comparison_table(
    evaluations: Sequence[Evaluation], targets: Tensor, *, num_resamples: int = 1000, seed: int = 0
) -> list[Row]:
    """One flat row per network, of plain strings, numbers and None: its name, kind and budget, `score`, its costs.

    Args:
        evaluations: The networks, in the order of the table.
        targets: True classes, int64, one for each image.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        StitchError: If there is no network, or targets and probabilities do not fit each other.
    """
    if not evaluations:
        raise StitchError("A comparison needs at least one evaluated network; the list is empty.")
    return [
        {
            "name": e.name,
            "kind": e.kind,
            "budget": e.budget,
            **score(e, targets, num_resamples=num_resamples, seed=seed),
            "params": e.params,
            "macs": e.macs,
            "seconds": e.seconds,
            "labels": e.labels,
            "cka_product": e.cka_product,
        }
        for e in evaluations
    ]


def print_table(rows: Sequence[Row], sentence: str, *, title: str, console: Console | None = None) -> None:
    """Print the table and the verdict; 120 characters are wide enough. Its column CKA is the product of the CKAs.

    Args:
        rows: What `comparison_table` returned.
        sentence: What `verdict` returned.
        title: Heading of the table.
        console: Where to print; None: standard output.

    Raises:
        StitchError: If there are no rows.
    """
    console = console or Console()
    if not console.is_terminal:
        # A file or a pipe has no width; rich would assume 80.
        console.width = max(console.width, _WIDTH)
    roomy = console.width >= _WIDTH
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    cells = _cells(rows)
    for column in cells[0]:
        first = column == "network"
        table.add_column(column, justify="left" if first else "right", no_wrap=roomy and not first, overflow="fold")
    for row, line in zip(rows, cells, strict=True):
        about = row["budget"] or row["kind"]
        table.add_row(Text(f"{line['network']}\n {about}"), *list(line.values())[1:])
    console.print(table)
    console.print()
    console.print(Text(sentence))


def write_table(
    rows: Sequence[Row], sentence: str, directory: str | Path, *, settings: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write `comparison.csv` and `comparison.json`, replacing those that are there.

    Args:
        rows: What `comparison_table` returned.
        sentence: What `verdict` returned.
        directory: Where to; made if it does not exist.
        settings: What the comparison was run with, as plain JSON values; it goes into the JSON file.

    Returns:
        The paths of the two files.

    Raises:
        StitchError: If there are no rows, or rows or settings are not plain finite JSON values; nothing is written.
    """
    _require(rows)
    record = {"verdict": sentence, "settings": dict(settings or {}), "rows": list(rows)}
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StitchError(f"Rows and settings must be plain JSON values, without NaN: {error}.") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, json_path = folder / "comparison.csv", folder / "comparison.json"
    json_path.write_text(text + "\n", encoding="utf-8")
    with csv_path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return csv_path, json_path


def _require(rows: Sequence[Row]) -> None:
    if not rows:
        raise StitchError("There are no rows to show; `comparison_table` makes them.")


def _cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What both tables show, as text; a column that is empty throughout is left out."""
    _require(rows)
    table = [
        {
            "network": str(row["name"]),
            **{metric.replace("_", " ").replace("auroc", "AUROC"): _with_interval(row, metric) for metric in _METRICS},
            "M params": f"{row['params'] / 1e6:.2f}",
            "M MACs": f"{row['macs'] / 1e6:.1f}",
            "seconds": f"{row['seconds']:.1f}",
            "labels": str(row["labels"]),
            "CKA": "-" if row["cka_product"] is None else f"{row['cka_product']:.3f}",
        }
        for row in rows
    ]
    empty = {column for column in table[0] if all(line[column] == "-" for line in table)}
    return [{column: cell for column, cell in line.items() if column not in empty} for line in table]


def _with_interval(row: Row, metric: str) -> str:
    if row[metric] is None:
        return "-"
    return f"{row[metric]:.3f} [{row[f'{metric}_low']:.2f}, {row[f'{metric}_high']:.2f}]"


def candidate_rows(result: SearchResult) -> list[dict[str, Any]]:
    """One flat row for each candidate, best first, of plain strings, numbers, booleans and None.

    Its place (1 is the best), its kind and fragments in words, its costs (`activation_bytes` and `latency_ms` as
    measured; None: they were not), each score of the ranking, and whether it is one of `SearchResult.pareto` in MACs
    and in parameters.

    Args:
        result: What the search found.
    """
    scores = dict.fromkeys(name for r in result.ranked for name in r.scores)
    fronts = {measure: {id(r) for r in result.pareto(measure)} for measure in ("macs", "params")}
    return [
        {
            "place": place,
            "kind": r.candidate.kind,
            "path": r.candidate.recipe.path,
            "params": r.candidate.cost.params,
            "macs": r.candidate.cost.macs,
            "activation_bytes": r.activation_bytes,
            "latency_ms": r.latency_ms,
            **{name: r.scores.get(name) for name in scores},
            "on_pareto_macs": id(r) in fronts["macs"],
            "on_pareto_params": id(r) in fronts["params"],
        }
        for place, r in enumerate(result.ranked, start=1)
    ]


def write_candidates(result: SearchResult, directory: str | Path) -> Path:
    """Write `candidates.csv`, replacing one that is there; None is an empty field.

    Args:
        result: What the search found.
        directory: Where to; made if it does not exist.

    Returns:
        The path of the file.
    """
    rows = candidate_rows(result)
    path = Path(directory) / "candidates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
