"""Which networks a comparison shows, chosen without test images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_stitch.cost import Budget
from lightning_stitch.report.kinds import RIVALS, UNDER_BUDGETS, is_composition, row_name
from lightning_stitch.search import Ranked, SearchResult
from lightning_stitch.stitching import Candidate


@dataclass(frozen=True, slots=True)
class Finalist:
    """A network that goes into the table, chosen without test images under budgets (in words).

    `search_seconds` is the wall time of what led to it, the head apart; `search_labels` are those used in choosing it.
    """

    candidate: Candidate
    budget: str | None
    search_seconds: float
    search_labels: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.candidate.cost.macs


def finalists(
    result: SearchResult, fractions: Sequence[float], budget: Budget | None = None
) -> tuple[list[Finalist], tuple[str, ...]]:
    """Which networks the comparison shows, each once.

    Every source, every self-stitched source, the search's choice, the best network of each kind under each share of the
    budget, and the best of each kind of one source alone that takes no more MACs than one of those compositions.
    Shares are of the smallest source's MACs. What is over the search's budget says so. Returned are the finalists, and
    the budgets that no StitchNet keeps.
    """
    spent = sum(result.seconds.values())
    prepared = result.seconds["cut"] + result.seconds["calibrate"]
    chosen: dict[int, Finalist] = {}

    def add(ranked: Ranked, words: str) -> None:
        candidate = ranked.candidate
        before = chosen.get(id(candidate))
        if before is None:
            chosen[id(candidate)] = Finalist(candidate, words, spent, result.num_selection_labels)
        else:
            chosen[id(candidate)] = replace(before, budget="; ".join(filter(None, (before.budget, words))))

    def best(kind: str, limit: float) -> Ranked | None:
        fitting = (r for r in result.ranked if r.candidate.kind == kind and r.candidate.cost.macs <= limit)
        return next(fitting, None)

    for kind in ("source", "self-stitched"):
        for ranked in result.ranked:
            if ranked.candidate.kind == kind:
                seconds = prepared if kind == "self-stitched" else 0.0
                chosen[id(ranked.candidate)] = Finalist(ranked.candidate, None, seconds, 0)
    smallest = min(finalist.macs for finalist in chosen.values() if finalist.candidate.kind == "source")
    limits = [("no budget", math.inf), *((f"<= {share:.0%} of MACs", share * smallest) for share in fractions)]
    unmet: list[str] = []
    for words, limit in limits:
        for kind in UNDER_BUDGETS:
            first = best(kind, limit)
            if first is not None:
                add(first, words)
            elif kind == "stitched":
                unmet.append(words if limit < math.inf else "any budget")
    add(result.best, "chosen by the search")
    for finalist in [f for f in chosen.values() if is_composition(f.candidate) or f.candidate.kind == "staged"]:
        for kind in RIVALS:
            for limit, words in _limits(finalist):
                rival = best(kind, limit)
                if rival is not None and id(rival.candidate) not in chosen:
                    add(rival, words)
    if budget is not None:
        for key, finalist in chosen.items():
            if not budget.allows(finalist.candidate.cost):
                words = "; ".join(filter(None, (finalist.budget, "over the search's budget")))
                chosen[key] = replace(finalist, budget=words)
    return list(chosen.values()), tuple(unmet)


def _limits(finalist: Finalist) -> list[tuple[float, str]]:
    """The MACs that rivals may take, and in words: as many as it takes at most, and on average."""
    name = row_name(finalist.candidate)
    mean = finalist.candidate.cost.mean_macs
    limits = [(float(finalist.macs), f"<= MACs of {name}")]
    return limits if mean is None else [(mean, f"<= mean MACs of {name}"), *limits]
