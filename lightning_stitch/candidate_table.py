"""Every candidate of a search as a row of a table, to plot or to choose from afterwards."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_stitch.search.results import SearchResult


def candidate_rows(result: SearchResult) -> list[dict[str, Any]]:
    """One flat row for each candidate, best first, of plain strings, numbers, booleans and None.

    Its place (1 is the best), its kind and fragments in words, its costs (`latency_ms` as measured; None: it was not),
    each score of the ranking, and whether it is one of `SearchResult.pareto` in MACs and in parameters.

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
            "activation_bytes": r.candidate.cost.activation_bytes,
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
