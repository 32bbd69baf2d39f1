"""The honest table behind a search: chosen networks beside all sources, same head and labels, unseen test images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_stitch.composing import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.progress import Progress, Silent, num_images
from lightning_stitch.report.evaluation import Evaluation, verdict
from lightning_stitch.report.tables import comparison_table
from lightning_stitch.search import SearchResult
from lightning_stitch.stitching import Candidate
from lightning_stitch.tables import Record

Loader = Iterable[Any]


@dataclass(frozen=True, slots=True)
class Finalist:
    """A network that goes into the table, chosen without test images under a budget (in words).

    `search_seconds` is the wall time of what led to it, the head apart; `search_labels` are those used in choosing it.
    """

    name: str
    candidate: Candidate
    budget: str | None
    search_seconds: float
    search_labels: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of `comparison_table`, the `verdict` on whether a StitchNet beat the best source, and unmet budgets.

    A budget is unmet, in words, where no StitchNet keeps it.
    """

    rows: list[Record]
    sentence: str
    unmet: tuple[str, ...]


def finalists(result: SearchResult, fractions: Sequence[float]) -> tuple[list[Finalist], tuple[str, ...]]:
    """Every source, every self-stitched source, and the best StitchNet and early exit under each share of the budget.

    Shares are of the smallest source's MACs. Returned are the finalists, and the budgets that no StitchNet keeps.
    """
    spent = sum(result.seconds.values())
    prepared = result.seconds["cut"] + result.seconds["calibrate"]
    labels = result.num_selection_labels
    chosen = []
    for kind in ("source", "self-stitched"):
        for ranked in result.ranked:
            candidate = ranked.candidate
            if candidate.kind == kind:
                name = candidate.recipe.fragments[0].source
                chosen.append(Finalist(name, candidate, None, prepared if kind == "self-stitched" else 0.0, 0))
    smallest = min(r.candidate.cost.macs for r in result.ranked if r.candidate.kind == "source")
    limits = [("no budget", math.inf), *((f"<= {share:.0%} of MACs", share * smallest) for share in fractions)]
    unmet = []
    for words, limit in limits:
        budget = Budget(max_macs=limit)
        stitched, exit = result.within(budget, kind="stitched"), result.within(budget, kind="early exit")
        if stitched is None:
            unmet.append(words if limit < math.inf else "any budget")
        else:
            chosen.append(Finalist("StitchNet", stitched.candidate, words, spent, labels))
        if exit is not None:
            name = exit.candidate.recipe.fragments[0].source
            chosen.append(Finalist(name, exit.candidate, f"early exit, {words}", spent, labels))
    return chosen, tuple(unmet)


def compare(
    pool: Pool,
    result: SearchResult,
    train: Loader,
    test: Loader,
    *,
    num_classes: int,
    head: HeadSettings | None = None,
    fractions: Sequence[float] = (0.75, 0.5, 1 / 3),
    num_resamples: int = 1000,
    progress: Progress | None = None,
) -> Comparison:
    """Fit the same closed-form head on every finalist and evaluate all of them on the test images.

    Args:
        pool: The pool that was searched, its sources still at hand.
        result: What the search found.
        train: Batches of (images, labels) for the heads.
        test: Batches of (images, labels) that nothing else has touched.
        num_classes: Number of classes.
        head: The head, for classes; None: ridge.
        fractions: Shares of the smallest source's MACs under which the best StitchNet is shown.
        num_resamples: Bootstrap resamples of the test images.
        progress: Where to show progress.

    Raises:
        CalibrationError: If a part has no labels; a class map needs them for the test images only.
        StitchError: If the head is not one for classes.
    """
    head = head or HeadSettings.of("ridge", num_classes=num_classes)
    if head.task != "multiclass" or head.name == "none":
        raise StitchError(f"The comparison tells classes apart; found head={head.name!r} with task={head.task!r}.")
    progress = progress or Silent()
    chosen, unmet = finalists(result, fractions)
    candidates = [finalist.candidate for finalist in chosen]
    progress.start("head images", num_images(train))
    # A head that takes no labels is fitted on nothing, but each candidate has its seconds from running some images.
    seen_by_heads = train if head.needs_targets else [next(iter(train))]
    outcomes, labels = pool.outcomes(candidates, seen_by_heads, progress=progress)
    progress.start("test images", num_images(test))
    tested, targets = pool.outcomes(candidates, test, progress=progress)
    if targets is None or (labels is None and head.needs_targets):
        raise CalibrationError("The comparison needs labels for the training and the test images.")
    evaluations = []
    for finalist, outcome, seen in zip(chosen, outcomes, tested, strict=True):
        begun = time.perf_counter()
        fitted, _ = head.fit(outcome.features, labels, outcome.blocks)
        seconds = finalist.search_seconds + outcome.seconds + time.perf_counter() - begun
        with torch.no_grad():
            probabilities = fitted(seen.features).softmax(dim=-1)
        num_labels = len(labels) if head.needs_targets and labels is not None else 0
        candidate = finalist.candidate
        evaluations.append(
            Evaluation(
                name=finalist.name,
                kind=candidate.kind,
                probabilities=probabilities,
                params=candidate.cost.params,
                macs=candidate.cost.macs,
                seconds=seconds,
                labels=num_labels + finalist.search_labels,
                cka_product=candidate.cka_product if candidate.recipe.stitches else None,
                budget=finalist.budget,
            )
        )
    rows = comparison_table(evaluations, targets, num_resamples=num_resamples)
    best = result.best_source.candidate.recipe.fragments[0].source
    source = next(e for e in evaluations if (e.kind, e.name) == ("source", best))
    stitched = next((e for e in evaluations if e.kind == "stitched"), None)
    return Comparison(rows, verdict(source, stitched, targets, num_resamples=num_resamples), unmet)
