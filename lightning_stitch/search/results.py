"""What a search found, and whether it was worth it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_stitch.cost import Budget, in_words
from lightning_stitch.errors import BudgetError
from lightning_stitch.heads import count_of
from lightning_stitch.progress import Progress
from lightning_stitch.search.evaluation import Outcome
from lightning_stitch.search.ranking import Ranking, SelectionData, find_ranking
from lightning_stitch.search.stopping import Stopped
from lightning_stitch.stitching import Candidate, Kind

_IN_WORDS: dict[Stopped, str] = {
    "time limit": "The time limit ended the search early.",
    "interrupted": "The search was interrupted.",
}

# What is measured of assembled networks, in this order: what the lowest is called, and why one above is left out
_MEASURED = {
    "activation_bytes": ("leanest", "over the activation budget when measured"),
    "latency_ms": ("fastest", "over the latency budget when measured"),
}


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its place.

    Attributes:
        candidate: The candidate.
        scores: What the ranking measured on the selection images, by name.
        features: Width of its output.
        seconds: Wall time of running it over the selection images.
        activation_bytes: Most bytes of activations alive at once in the assembled network (`network_cost`); None: no
            limit asked for it, or another limit was not kept.
        latency_ms: Milliseconds that the assembled network takes for one image (`lightning_stitch.search.latency`);
            None: likewise.
    """

    candidate: Candidate
    scores: dict[str, float]
    features: int
    seconds: float
    activation_bytes: float | None = None
    latency_ms: float | None = None

    @property
    def score(self) -> float:
        """The first score, which decides the place."""
        return next(iter(self.scores.values()))

    def measured(self, measure: str, value: float) -> Ranked:
        """The same with its "activation_bytes" or "latency_ms", which go into the recipe's scores, too."""
        recipe = self.candidate.recipe
        recipe = dataclasses.replace(recipe, scores={**recipe.scores, measure: value})
        candidate = dataclasses.replace(self.candidate, recipe=recipe)
        return dataclasses.replace(self, candidate=candidate, **{measure: value})  # type: ignore[arg-type]

    @property
    def judged_by(self) -> str:
        """The score that a budget's least score limits: leave-one-out accuracy where there is one, else the first."""
        return "loo_accuracy" if "loo_accuracy" in self.scores else next(iter(self.scores))

    def reaches(self, min_score: float | None) -> bool:
        """Whether the score that it is judged by is at least so much."""
        return min_score is None or self.scores[self.judged_by] >= min_score

    @property
    def in_figures(self) -> str:
        """The value of its first score, and what it is judged by if that is another."""
        name, other = next(iter(self.scores)), self.judged_by
        return f"{self.score:.4f}" + ("" if other == name else f" ({other} {self.scores[other]:.4f})")

    def __str__(self) -> str:
        figures = {measure: getattr(self, measure) for measure in _MEASURED}
        measured = [in_words(measure, value, digits=4) for measure, value in figures.items() if value is not None]
        return ", ".join([self.candidate.kind, str(self.candidate.cost), *measured])


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: All candidates, best first: the StitchNets and early exits that keep the budget, and the sources as they
            are and self-stitched, budget or no.
        best: The best that keeps the budget, an unmodified source where no other beat it. Where the budget has a least
            score: the one with the fewest MACs.
        best_source: The best unmodified source, budget or no.
        best_self_stitched: The best source stitched to itself; None: none gave features to rank by.
        best_stitched: The best StitchNet within the budget; None: none was found.
        rejected: How many compositions were turned down, by reason.
        seconds: Wall time of each stage.
        num_selection_labels: Labels that the ranking used.
        min_score: The least score that the budget asked for; None: none.
        stopped: What ended the composing before the strategy did: "time limit" or "interrupted"; None: nothing.
    """

    ranked: tuple[Ranked, ...]
    best: Ranked
    best_source: Ranked
    best_self_stitched: Ranked | None
    best_stitched: Ranked | None
    rejected: dict[str, int]
    seconds: dict[str, float]
    num_selection_labels: int
    min_score: float | None = None
    stopped: Stopped | None = None

    def within(self, budget: Budget, *, kind: Kind | None = None) -> Ranked | None:
        """The best of the candidates that keeps a budget, without searching again; None where there is none.

        With a least score it is the one of the fewest MACs.

        Args:
            budget: The limits.
            kind: Only candidates of this kind; None: of any.

        Raises:
            BudgetError: If the budget limits latency or activation bytes and the search did not, so that nothing was
                measured.
        """
        for measure in budget.limits.keys() & _MEASURED.keys():
            self._check_measured(measure)
        fitting = [r for r in self.ranked if kind in (None, r.candidate.kind) and _keeps(r, budget)]
        return _best(fitting, budget) if fitting else None

    def pareto(self, measure: Literal["macs", "params", "activation_bytes"] = "macs") -> list[Ranked]:
        """The candidates of which none is both cheaper and better, the cheapest first.

        Better is a higher first score; of equal cost and score the one that ranks first is kept.

        Args:
            measure: The cost; in activation bytes those are left out that were not measured.

        Raises:
            BudgetError: If the measure is activation bytes and the search did not limit them, so that none were
                measured.
        """
        if measure == "activation_bytes":
            self._check_measured(measure)
            costs = [(r.activation_bytes, place, r) for place, r in enumerate(self.ranked)]
        else:
            costs = [(getattr(r.candidate.cost, measure), place, r) for place, r in enumerate(self.ranked)]
        front: list[Ranked] = []
        for _, _, r in sorted(entry for entry in costs if entry[0] is not None):
            if not front or r.score > front[-1].score:
                front.append(r)
        return front

    @property
    def beat_best_source(self) -> bool:
        """Whether the best candidate ranks before the best source, which may be over the budget."""
        return self.ranked.index(self.best) < self.ranked.index(self.best_source)

    def summary(self) -> str:
        """Whether the search was worth it, by the selection images alone, and what stopped it if something did."""
        return self._verdict() + ("" if self.stopped is None else f" {_IN_WORDS[self.stopped]}")

    def _check_measured(self, measure: str) -> None:
        if all(getattr(r, measure) is None for r in self.ranked):
            what = {"activation_bytes": "activation bytes", "latency_ms": "latencies"}[measure]
            raise BudgetError(f"This search measured no {what}; search with a budget that limits max_{measure}.")

    def _verdict(self) -> str:
        source = self.best_source.candidate.recipe.fragments[0].source
        own = f"{source}, {self.best_source.candidate.cost}"
        name, found, reference = next(iter(self.best.scores)), self.best.in_figures, self.best_source.in_figures
        if self.min_score is not None:
            found = found if name == self.best.judged_by else f"{name} {found}"
            return (
                f"The candidate with the fewest MACs whose {self.best.judged_by} is at least {self.min_score:g} "
                f"({self.best}) has {found} on the selection images, the best source ({own}) {reference}."
            )
        if self.beat_best_source:
            return (
                f"The best candidate ({self.best}) has {name} {found} on the selection images, the best source ({own}) "
                f"{reference}."
            )
        if self.best is self.best_source:
            return (
                f"No candidate beat the best source on the selection images: {source} has {name} {reference}; "
                f"it is returned as it is."
            )
        return (
            f"No candidate within the budget beat the best source on the selection images: {source} "
            f"({self.best_source.candidate.cost}) has {name} {reference} but is over the budget; the best within "
            f"it ({self.best}) has {found}."
        )


def rank(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    labels: Tensor | None,
    *,
    ranking: str | Ranking,
    num_classes: int | None,
    rejected: Counter[str],
) -> list[Ranked]:
    """Candidates by what they gave on the selection images, best first.

    Args:
        candidates: The candidates, every source as it is among them.
        outcomes: What each gave.
        labels: The targets of the selection images (`SelectionData`); None: there are none.
        ranking: Name of a ranking, or a function.
        num_classes: Number of classes; None: as many as the labels say.
        rejected: Where those are counted whose features tell no images apart; they are left out.
    """
    pairs = list(zip(candidates, outcomes, strict=True))
    own = {c.recipe.fragments[-1].source: outcome.features for c, outcome in pairs if c.kind == "source"}
    usable = [(c, outcome) for c, outcome in pairs if c.kind == "source" or _is_usable(outcome.features)]
    if len(usable) < len(pairs):
        rejected["features not finite or constant on the selection images"] = len(pairs) - len(usable)
    selection = SelectionData(
        features=[outcome.features for _, outcome in usable],
        targets=labels,
        own_features=[own[c.recipe.fragments[-1].source] for c, _ in usable],
        num_classes=num_classes if num_classes is not None or labels is None else count_of(labels),
    )
    scores = find_ranking(ranking, labelled=labels is not None)([c for c, _ in usable], selection)
    ranked = [
        _ranked(candidate, {name: float(value) for name, value in score.items()}, outcome)
        for (candidate, outcome), score in zip(usable, scores, strict=True)
    ]
    # Equal scores keep the order of the search, in which the sources come first: a tie is no win over a source.
    return sorted(ranked, key=lambda r: tuple(-value for value in r.scores.values()))


def measured(
    ranked: Sequence[Ranked], budget: Budget, meters: Mapping[str, Callable[[Candidate], float]], progress: Progress
) -> list[Ranked]:
    """The same, those measured that keep all other limits of a budget, each until it is over one.

    Args:
        ranked: All candidates.
        budget: The limits.
        meters: What measures a candidate, by measure ("activation_bytes", "latency_ms"), in this order.
        progress: Where to show progress.
    """
    progress.start("measuring", len(ranked))
    found = []
    for r in ranked:
        if budget.allows(r.candidate.cost) and r.reaches(budget.min_score):
            for measure, meter in meters.items():
                r = r.measured(measure, meter(r.candidate))
                if not _is_within(r, budget, measure):
                    break
        found.append(r)
        progress.advance(1)
    return found


def choose(
    ranked: Sequence[Ranked],
    budget: Budget,
    *,
    rejected: Mapping[str, int],
    seconds: Mapping[str, float],
    num_selection_labels: int,
    stopped: Stopped | None = None,
) -> SearchResult:
    """The result of a search: what keeps the budget, and the best of it.

    Args:
        ranked: All candidates, best first, measured where the budget limits latency or activation bytes.
        budget: The limits.
        rejected: How many compositions were turned down before, by reason.
        seconds: Wall time of each stage.
        num_selection_labels: Labels that the ranking used.
        stopped: What ended the composing before the strategy did.

    Raises:
        BudgetError: If none keeps the budget; names the one that comes nearest, and its cost.
    """
    allowed = [r for r in ranked if budget.allows(r.candidate.cost)]
    reaching = [r for r in allowed if r.reaches(budget.min_score)]
    early = "" if stopped is None else f" {_IN_WORDS[stopped]}"
    if not allowed:
        cheapest = min(ranked, key=lambda r: r.candidate.cost.macs)
        raise BudgetError(
            f"The search found no network within the budget ({budget}); the cheapest it found has "
            f"{cheapest.candidate.cost}. Raise the budget, or widen the search.{early}"
        )
    if not reaching:
        name = allowed[0].judged_by
        value = max(r.scores[name] for r in allowed)
        raise BudgetError(
            f"The search found no network within the budget ({budget}): the highest {name} is {value:.4f} "
            f"({next(r for r in allowed if r.scores[name] == value)}). Lower min_score, raise the other limits, or "
            f"widen the search.{early}"
        )
    fitting = reaching
    for measure, (lowest, _) in _MEASURED.items():
        within = [r for r in fitting if _is_within(r, budget, measure)]
        if not within:
            nearest = min(fitting, key=lambda r: getattr(r, measure))
            raise BudgetError(
                f"The search found no network within the budget ({budget}): of {len(fitting)} that were measured, the "
                f"{lowest} is over it ({nearest}). Raise max_{measure}, or widen the search.{early}"
            )
        fitting = within
    reasons = Counter(rejected)
    references = ("source", "self-stitched")
    returned = [r for r in ranked if r.candidate.kind in references or _keeps(r, budget)]
    for r in ranked:
        if r.candidate.kind in references or _keeps(r, budget):
            continue
        over = [reason for measure, (_, reason) in _MEASURED.items() if not _is_within(r, budget, measure)]
        reasons[over[0] if r.reaches(budget.min_score) else "below the least score"] += 1

    def first(kind: str, among: Sequence[Ranked]) -> Ranked | None:
        return next((r for r in among if r.candidate.kind == kind), None)

    best_source = first("source", returned)
    assert best_source is not None
    return SearchResult(
        ranked=tuple(returned),
        best=_best(fitting, budget),
        best_source=best_source,
        best_self_stitched=first("self-stitched", returned),
        best_stitched=first("stitched", fitting),
        rejected=dict(reasons),
        seconds=dict(seconds),
        num_selection_labels=num_selection_labels,
        min_score=budget.min_score,
        stopped=stopped,
    )


def _best(fitting: Sequence[Ranked], budget: Budget) -> Ranked:
    return fitting[0] if budget.min_score is None else min(fitting, key=lambda r: r.candidate.cost.macs)


def _keeps(r: Ranked, budget: Budget) -> bool:
    within = all(_is_within(r, budget, measure) for measure in _MEASURED)
    return within and budget.allows(r.candidate.cost) and r.reaches(budget.min_score)


def _is_within(r: Ranked, budget: Budget, measure: str) -> bool:
    """Whether there is no limit on what is measured, or it was measured and keeps it."""
    limit, value = budget.limits.get(measure), getattr(r, measure)
    return limit is None or (value is not None and value <= limit)


def _ranked(candidate: Candidate, scores: dict[str, float], outcome: Outcome) -> Ranked:
    recipe = dataclasses.replace(candidate.recipe, scores={**scores, **candidate.recipe.scores})
    return Ranked(dataclasses.replace(candidate, recipe=recipe), scores, outcome.features.shape[1], outcome.seconds)


def _is_usable(features: Tensor) -> bool:
    """Whether a ranking can tell the images apart by these features."""
    return bool(torch.isfinite(features).all()) and bool((features != features[0]).any())
