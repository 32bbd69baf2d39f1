"""A search's candidates as rows: for files, for the console and for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lightning_stitch.recipe import Recipe
from lightning_stitch.tables import Record

if TYPE_CHECKING:
    from lightning_stitch.search.results import Ranked, SearchResult
    from lightning_stitch.stitching import Candidate


def records_of(result: SearchResult) -> list[Record]:
    """One flat row for each candidate, best first: `SearchResult.to_records`."""
    scores = dict.fromkeys(name for r in result.ranked for name in r.scores)
    cheapest, smallest = result.pareto("macs"), result.pareto("params")
    return [
        {
            "place": place,
            "kind": r.candidate.kind,
            "path": r.candidate.recipe.path,
            "params": r.candidate.cost.params,
            "macs": r.candidate.cost.macs,
            "mean_macs": r.candidate.cost.mean_macs,
            "activation_bytes": r.activation_bytes,
            "latency_ms": r.latency_ms,
            **{name: r.scores.get(name) for name in scores},
            "on_pareto_macs": r in cheapest,
            "on_pareto_params": r in smallest,
        }
        for place, r in enumerate(result.ranked, start=1)
    ]


def fragments_in_words(recipe: Recipe) -> str:
    """What a network is made of, as "resnet: image .. layer2 | vit: blocks.3 .. output"."""
    return " | ".join(str(run.ref) for run in recipe.runs)


def candidate_in_words(candidate: Candidate) -> str:
    """The same; of a source that is stitched to itself at every cut, its name."""
    recipe = candidate.recipe
    return recipe.sources[0].name if candidate.kind == "self-stitched" else fragments_in_words(recipe)


def cells_of(result: SearchResult, limit: int) -> list[dict[str, str]]:
    """The best candidates and what was chosen, as text for a narrow table."""
    shown = [*result.ranked[:limit], *([] if result.best in result.ranked[:limit] else [result.best])]
    return [
        {
            "place": f"{result.ranked.index(r) + 1}{' *' if r is result.best else ''}",
            r.judged_by.replace("_", " ").replace("loo", "left-out"): f"{r.scores[r.judged_by]:.3f}",
            "M params": f"{r.candidate.cost.params / 1e6:.2f}",
            "M MACs": _macs(r),
            "network": f"{r.candidate.kind}: {candidate_in_words(r.candidate)}",
        }
        for r in shown
    ]


def html_of(result: SearchResult, limit: int) -> str:
    """The same as an HTML table, with the verdict."""
    rows = cells_of(result, limit)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align: left'>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>"
        for row in rows
    )
    return f"<p>{html.escape(result.summary())}</p><table><tr>{head}</tr>{body}</table>"


def _macs(r: Ranked) -> str:
    cost = r.candidate.cost
    mean = "" if cost.mean_macs is None else f", mean {cost.mean_macs / 1e6:.1f}"
    return f"{cost.macs / 1e6:.1f}{mean}"
