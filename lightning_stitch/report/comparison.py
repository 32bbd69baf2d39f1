"""The honest table behind a search: chosen networks beside all sources, same head and labels, unseen test images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch.composing import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import HeadSettings, StagedHead
from lightning_stitch.progress import Progress, Silent, num_images
from lightning_stitch.recipe import Recipe
from lightning_stitch.report.evaluation import Evaluation, correct
from lightning_stitch.report.finalists import Finalist, finalists
from lightning_stitch.report.kinds import RIVALS, is_composition, label_of, rival_group, row_name, sources_of
from lightning_stitch.report.similarities import similarities_of
from lightning_stitch.report.tables import comparison_table
from lightning_stitch.report.verdicts import (
    MARGIN,
    Verdict,
    check_margin,
    guessing_in_words,
    guessing_share,
    in_short,
    in_words,
    judge,
)
from lightning_stitch.search import SearchResult
from lightning_stitch.tables import Record

Loader = Iterable[Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What chosen networks did on test images, beside what the sources allow without composing.

    Attributes:
        rows: Those of `comparison_table`; where a network is judged, "verdict" says it in a few words.
        verdicts: On what the search chose, unless that is a source as it is, and on every composition of several
            sources, against the best source, and against the best of each kind of network of one source alone that
            takes no more MACs.
        words: Whether it was worth it, in lines (`verdicts.in_words`).
        unmet: The budgets, in words, that no StitchNet keeps.
        probabilities: Of each class, that what the search chose gives for the test images (images x classes).
        targets: Their classes (images,).
        similarities: How alike the sources are (`report.similarities_of`), over the images for the heads.
    """

    rows: list[Record]
    verdicts: tuple[Verdict, ...]
    words: str
    unmet: tuple[str, ...]
    probabilities: Tensor = field(repr=False, compare=False)
    targets: Tensor = field(repr=False, compare=False)
    similarities: list[Record] = field(repr=False, compare=False)


def compare(
    pool: Pool,
    result: SearchResult,
    train: Loader,
    test: Loader,
    *,
    num_classes: int,
    head: HeadSettings | None = None,
    fractions: Sequence[float] = (0.75, 0.5, 1 / 3),
    budget: Budget | None = None,
    margin: float = MARGIN,
    num_resamples: int = 1000,
    includes_selection: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Fit the same closed-form head on every finalist, evaluate all of them on the test images, and judge.

    Args:
        pool: The pool that was searched, its sources still at hand.
        result: What the search found.
        train: Batches of (images, labels) for the heads.
        test: Batches of (images, labels) that nothing else has touched.
        num_classes: Number of classes.
        head: The head, for classes; None: ridge.
        fractions: Shares of the smallest source's MACs under which the best networks are shown.
        budget: The search's, so that rows over it say so; None: it had none.
        margin: The least difference in accuracy that counts (`judge`).
        num_resamples: Bootstrap resamples of the test images.
        includes_selection: Whether the images for the heads include those that the search chose by, whose labels are
            then not counted twice.
        progress: Where to show progress.

    Raises:
        CalibrationError: If a part has no labels; a class map needs them for the test images only.
        StitchError: If the head is not one for classes, or the margin is not from 0 to 1.
    """
    head = head or HeadSettings.of("ridge", num_classes=num_classes)
    if head.task != "multiclass" or head.name == "none":
        raise StitchError(f"The comparison tells classes apart; found head={head.name!r} with task={head.task!r}.")
    check_margin(margin)
    progress = progress or Silent()
    chosen, unmet = finalists(result, fractions, budget)
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
        fitted, _ = head.fit_for(finalist.candidate.recipe, outcome.features, labels)
        seconds = finalist.search_seconds + outcome.seconds + time.perf_counter() - begun
        with torch.no_grad():
            probabilities = fitted(seen.features).softmax(dim=-1)
        num_labels = len(labels) if head.needs_targets and labels is not None else 0
        candidate, used = finalist.candidate, finalist.search_labels
        evaluations.append(
            Evaluation(
                name=row_name(candidate),
                kind=candidate.kind,
                probabilities=probabilities,
                params=candidate.cost.params,
                macs=candidate.cost.macs,
                seconds=seconds,
                labels=max(num_labels, used) if includes_selection else num_labels + used,
                cka_product=candidate.cka_product if candidate.recipe.stitches else None,
                budget=finalist.budget,
                sources=sources_of(candidate.recipe),
                label=label_of(candidate),
                mean_macs=_mean_macs(candidate.recipe, fitted, seen.features),
            )
        )
    rows = comparison_table(evaluations, targets, num_resamples=num_resamples)
    judged = _Judged(chosen, evaluations, targets, result, margin)
    for contender in judged.contenders:
        rows[contender]["verdict"] = in_short(judged.verdicts[contender])
    verdicts = tuple(verdict for account in judged.verdicts.values() for verdict in account)
    chosen_one = evaluations[judged.choice].probabilities
    sources = [n for n, candidate in enumerate(candidates) if candidate.kind == "source"]
    alike = similarities_of([candidates[n] for n in sources], [outcomes[n] for n in sources])
    return Comparison(rows, verdicts, judged.words(), unmet, chosen_one.cpu(), targets.cpu(), alike)


def _mean_macs(recipe: Recipe, head: nn.Module, features: Tensor) -> float | None:
    """What images take on average, where not all go all the way."""
    if recipe.stages is None or not isinstance(head, StagedHead):
        return None
    return float(torch.tensor(recipe.stages.macs, dtype=torch.float64)[head.stops(features).cpu()].mean())


class _Judged:
    """Who is judged against whom, and what is said of it."""

    def __init__(
        self,
        chosen: Sequence[Finalist],
        evaluations: Sequence[Evaluation],
        targets: Tensor,
        result: SearchResult,
        margin: float,
    ) -> None:
        self.chosen = chosen
        self.evaluations = evaluations
        self.targets = targets
        # Numbers of the finalists as the selection images rank them.
        place = {id(ranked.candidate): place for place, ranked in enumerate(result.ranked)}
        self.ranking = sorted(range(len(chosen)), key=lambda n: place[id(chosen[n].candidate)])
        numbers = {id(finalist.candidate): n for n, finalist in enumerate(chosen)}
        self.choice = numbers[id(result.best.candidate)]
        self.best_source = numbers[id(result.best_source.candidate)]
        composed = [n for n in self.ranking if is_composition(chosen[n].candidate)]
        news = [] if self.choice == self.best_source else [self.choice]
        self.contenders = list(dict.fromkeys(news + composed))
        self.verdicts = {
            contender: [
                judge(evaluations[rival], evaluations[contender], targets, margin=margin)
                for rival in self.rivals(contender)
            ]
            for contender in self.contenders
        }

    def allowed(self, contender: int) -> list[int]:
        """Networks of one source alone that take no more MACs on average, as the selection images rank them."""
        limit = self.chosen[contender].candidate.cost.expected_macs
        return [
            n
            for n in self.ranking
            if n != contender and self.evaluations[n].kind in RIVALS and self.chosen[n].macs <= limit
        ]

    def rivals(self, contender: int) -> list[int]:
        """The best of each kind that takes no more MACs, and the best source, whatever it takes."""
        best: dict[Any, int] = {}
        for n in self.allowed(contender):
            best.setdefault(rival_group(self.chosen[n].candidate), n)
        return [n for n in self.ranking if n in best.values() or n == self.best_source]

    def share(self, evaluation: Evaluation) -> float:
        """Accuracy on the test images."""
        return float(correct(evaluation, self.targets).mean())

    def words(self) -> str:
        """Of what the search chose, and of the best composition of several sources."""
        parts = []
        if self.choice == self.best_source:
            source = self.evaluations[self.best_source]
            parts.append(
                f"The search chose {source.label}, the best source, as it is: right on {self.share(source):.3f}."
            )
            guessing = guessing_share(source, self.targets)
            if guessing is not None:
                parts.append(f"Not worth it: {guessing_in_words(str(source.label), guessing)}")
        composed = [n for n in self.contenders if is_composition(self.chosen[n].candidate)]
        for contender in dict.fromkeys(self.contenders[:1] + composed[:1]):
            parts.append(in_words(self.verdicts[contender]))
            right, told = self.share(self.evaluations[contender]), self.rivals(contender)
            others = [self.evaluations[n] for n in self.allowed(contender) if n not in told]
            ahead = [other for other in others if self.share(other) > right]
            if ahead:
                words = ", ".join(f"{e.label} ({e.macs / 1e6:.3g} M MACs)" for e in ahead)
                parts.append(f"  ahead of it in the table for no more MACs: {words}")
        if not composed:
            parts.append("No composition of several sources was found that keeps the budget.")
        return "\n".join(parts)
