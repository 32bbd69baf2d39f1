"""Candidates and what is composed of them without a further pass, by what they gave on the selection images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import NEED_LABELS
from lightning_stitch.search.ranks import ALONE, Ranks
from lightning_stitch.search.results import Ranked, draw_rows, in_order, rank
from lightning_stitch.search.sides import side_by_side
from lightning_stitch.search.staging import staged
from lightning_stitch.settings import SearchSettings
from lightning_stitch.stitching import Candidate, Segmented


def rank_all(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    labels: Tensor | None,
    parts: Sequence[Segmented],
    settings: SearchSettings,
    *,
    num_classes: int | None,
    seed: int,
    compounds: bool,
    rejected: Counter[str],
    ranks: Ranks = ALONE,
) -> list[Ranked]:
    """Candidates, some of them side by side or as stages where labels allow it, best first.

    Args:
        candidates: Every source as it is among them.
        outcomes: What each gave.
        labels: Targets of the images (`SelectionData`).
        parts: The sources that the candidates' steps refer to.
        settings: The ranking, the budget, and how many may be joined.
        num_classes: Of the targets; None: as many as they say.
        seed: Draws the images that the ranking goes by, where there are many.
        compounds: Whether candidates may be joined.
        rejected: Counts those that cannot be ranked.
        ranks: Who shares the judging.

    Raises:
        CalibrationError: If a source overflows on the images.
    """
    outcomes, labels = draw_rows(outcomes, labels, seed)
    ranked, looked_at = rank(
        candidates,
        outcomes,
        labels,
        ranking=settings.ranking,
        num_classes=num_classes,
        rejected=rejected,
        ranks=ranks,
    )
    if labels is None or settings.ranking not in ("auto", *NEED_LABELS) or not compounds:
        return ranked
    by_key = {candidate.key: outcome for candidate, outcome in zip(candidates, outcomes, strict=True)}
    limits = settings.limits
    joined = side_by_side(ranked, looked_at, by_key, parts, limits, max_roots=settings.max_roots)
    if limits.mean_macs is not None:
        joined += staged(ranked, looked_at, by_key, parts, limits, max_stages=settings.max_stages)
    return in_order([*ranked, *joined])


def keys_worth_keeping(ranked: Sequence[Ranked]) -> set[str]:
    """What is read by references and by what some budget would choose, of candidates that come best first."""
    least: dict[str, int] = {}
    keys: set[str] = set()
    for candidate in (r.candidate for r in ranked):
        always = candidate.kind in ("source", "self-stitched")
        if always or candidate.cost.macs < least.get(candidate.kind, candidate.cost.macs + 1):
            least[candidate.kind] = candidate.cost.macs
            keys.update(keys_of_reads(candidate))
    return keys
