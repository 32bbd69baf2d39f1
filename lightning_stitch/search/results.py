"""What a search found, and whether it was worth it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from lightning_stitch.cost import Budget, in_words
from lightning_stitch.errors import BudgetError, CalibrationError
from lightning_stitch.heads import count_of
from lightning_stitch.progress import Progress
from lightning_stitch.search.evaluation import Outcome
from lightning_stitch.search.ranking import MAX_ROWS, Ranking, SelectionData, find_ranking
from lightning_stitch.search.ranks import ALONE, Ranks
from lightning_stitch.search.records import cells_of, html_of, records_of
from lightning_stitch.search.stopping import Stopped
from lightning_stitch.stitching import Candidate, Kind
from lightning_stitch.tables import Record, print_table

_IN_WORDS: dict[Stopped, str] = {
    "time limit": "The time limit ended the search early.",
    "interrupted": "The search was interrupted.",
}

# What is measured of assembled networks, in this order: what the lowest is called, and why one above is left out
_MEASURED = {
    "activation_bytes": ("leanest", "over the activation budget when measured"),
    "latency_ms": ("fastest", "over the latency budget when measured"),
}

_COMPOUND: tuple[Kind, ...] = ("side by side", "staged")


SCORES = {
    "loo_accuracy": "the accuracy on images left out of the head",
    "loo_r2": "the R2 of labels of images left out of the head",
    "loo_soft_r2": "the R2 of softened labels of images left out of the head",
    "careful_r2": "that R2 (loo_soft_r2) less two standard errors of being ahead of the best source",
    "neg_loo_log_loss": "less the log-loss of images left out of the head",
    "consensus": "how much it tells of what all sources see",
    "class_consensus": "how likely it finds what all sources together say",
}
"""What the names of scores mean."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its place.

    Attributes:
        candidate: The candidate.
        scores: What the ranking measured on the selection images, by name.
        features: Width of its output.
        seconds: Wall time of running it over the selection images.
        errors: Each selection image's squared error when it is left out, as the ranking's first score has it (images,),
            so that two candidates are compared image by image; None: the ranking did not say.
        losses: Each selection image's loss when it is left out (images,), by which one with stages is compared with
            others; None: the ranking did not say.
        activation_bytes: Most bytes of activations alive at once in the assembled network (`network_cost`); None: no
            limit asked for it, or another limit was not kept.
        latency_ms: Milliseconds that the assembled network takes for one image (`lightning_stitch.search.latency`);
            None: likewise.
    """

    candidate: Candidate
    scores: dict[str, float]
    features: int
    seconds: float
    errors: Tensor | None = field(default=None, repr=False, compare=False)
    losses: Tensor | None = field(default=None, repr=False, compare=False)
    activation_bytes: float | None = None
    latency_ms: float | None = None

    @property
    def score(self) -> float:
        """The first score, which decides the place."""
        return next(iter(self.scores.values()))

    def with_measurement(self, measure: str, value: float) -> Ranked:
        """The same with its "activation_bytes" or "latency_ms", which go into the recipe's scores, too."""
        recipe = self.candidate.recipe
        recipe = dataclasses.replace(recipe, scores={**recipe.scores, measure: value})
        candidate = dataclasses.replace(self.candidate, recipe=recipe)
        return dataclasses.replace(self, candidate=candidate, **{measure: value})  # type: ignore[arg-type]

    def gain_over(self, rival: Ranked) -> tuple[float, float]:
        """By how much it errs less than another, and the standard error of that over the images; 0 and 0: unknown."""
        if self.errors is None or rival.errors is None:
            return 0.0, 0.0
        return gain_of(self.errors, rival.errors)

    @property
    def judged_by(self) -> str:
        """The score that a budget's least score limits: leave-one-out accuracy where there is one, else the first."""
        return "loo_accuracy" if "loo_accuracy" in self.scores else next(iter(self.scores))

    def reaches(self, min_score: float | None) -> bool:
        """Whether the score that it is judged by is at least so much."""
        return min_score is None or self.scores[self.judged_by] >= min_score

    @property
    def in_figures(self) -> str:
        """What it is judged by, accuracy where there is one, and the score that chose if that is another."""
        first = next(iter(self.scores))
        if self.judged_by == first:
            return f"{first} {self.score:.4f}"
        return f"left-out accuracy {self.scores[self.judged_by]:.4f} ({first} {self.score:.4f})"

    def __repr__(self) -> str:
        return f"Ranked({self}, {self.judged_by} {self.scores[self.judged_by]:.4g})"

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
        best: The best that keeps the budget, an unmodified source where no other beat it by more than a standard error
            (`pick`). Where the budget has a least score: the one with the fewest MACs.
        best_source: The best unmodified source, budget or no.
        best_stitched: The best StitchNet within the budget; None: none was found.
        rejected: How many compositions were turned down, by reason.
        seconds: Wall time of each stage.
        peaks: By the end of each stage the most memory that the process had held, in bytes; empty: not known.
        num_selection_labels: Labels that the ranking used.
        min_score: The least score that the budget asked for; None: none.
        stopped: What ended the composing before the strategy did: "time limit" or "interrupted"; None: nothing.
    """

    ranked: tuple[Ranked, ...]
    best: Ranked
    best_source: Ranked
    best_stitched: Ranked | None
    rejected: dict[str, int]
    seconds: dict[str, float]
    num_selection_labels: int
    min_score: float | None = None
    stopped: Stopped | None = None
    peaks: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

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
            if all(getattr(r, measure) is None for r in self.ranked):
                what = {"activation_bytes": "activation bytes", "latency_ms": "latencies"}[measure]
                raise BudgetError(f"This search measured no {what}; search with a budget that limits max_{measure}.")
        fitting = [r for r in self.ranked if kind in (None, r.candidate.kind) and _objection(r, budget) is None]
        return pick(fitting, budget) if fitting else None

    def pareto(self, measure: Literal["macs", "mean_macs", "params"] = "macs") -> list[Ranked]:
        """The candidates of which none is both cheaper and better, the cheapest first.

        Better is a higher first score; "macs" are those of any image, "mean_macs" those of an image on average, where
        some networks stop when they are sure; of equal cost and score the one that ranks first is kept.
        """
        name = {"mean_macs": "expected_macs"}.get(measure, measure)
        costs = [(getattr(r.candidate.cost, name), place, r) for place, r in enumerate(self.ranked)]
        front: list[Ranked] = []
        for _, _, r in sorted(costs):
            if not front or r.score > front[-1].score:
                front.append(r)
        return front

    @property
    def beat_best_source(self) -> bool:
        """Whether the best candidate ranks before the best source, which may be over the budget."""
        return self.ranked.index(self.best) < self.ranked.index(self.best_source)

    def to_records(self) -> list[Record]:
        """One flat row for each candidate, best first, of plain strings, numbers, booleans and None.

        Its place (1 is the best), its kind and fragments, its costs (None: not measured), each score of the ranking,
        and whether it is one of `pareto` in MACs and in parameters. `pandas.DataFrame(result.to_records())` takes it.
        """
        return records_of(self)

    def table(self, limit: int = 20, *, console: Console | None = None) -> None:
        """Print the best candidates, and what was chosen (*), to standard output where no console is named."""
        notes: list[str | Text] = ["", Text(self.summary())]
        title = "Candidates, the best first; * was chosen"
        print_table(cells_of(self, limit), title=title, notes=notes, left=("network",), console=console)

    def _repr_html_(self) -> str:
        return html_of(self, limit=20)

    def __repr__(self) -> str:
        return f"SearchResult({len(self.ranked)} candidates, best={self.best!r}, best_source={self.best_source!r})"

    def summary(self) -> str:
        """Whether the search was worth it, by the selection images alone, and what stopped it if something did."""
        name = next(iter(self.best.scores))
        chose = f" {name}, which chose, is {SCORES[name]}." if name in SCORES else ""
        return self._verdict() + chose + ("" if self.stopped is None else f" {_IN_WORDS[self.stopped]}")

    def _verdict(self) -> str:
        source, cost = self.best_source.candidate.recipe.fragments[0].source, self.best_source.candidate.cost
        best, reference = self.best.in_figures, self.best_source.in_figures
        if self.min_score is not None:
            return (
                f"The candidate with the fewest MACs whose {self.best.judged_by} is at least {self.min_score:g} "
                f"({self.best}) has {best} on the selection images, the best source ({source}, {cost}) {reference}."
            )
        if self.beat_best_source:
            return (
                f"The best candidate ({self.best}) has {best} on the selection images, the best source "
                f"({source}, {cost}) {reference}."
            )
        if self.best is self.best_source:
            return (
                f"No candidate beat the best source by more than a standard error on the selection images: {source} "
                f"has {reference}; it is returned as it is."
            )
        return (
            f"No candidate within the budget beat the best source on the selection images: {source} "
            f"({cost}) has {reference} but is over the budget; the best within it ({self.best}) has {best}."
        )


def gain_of(errors: Tensor, rival: Tensor) -> tuple[float, float]:
    """By how much the sum over images (images,) is less than a rival's, and the standard error of that."""
    gains = rival - errors
    return float(gains.sum()), float(gains.std()) * math.sqrt(len(gains))


def rank(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    labels: Tensor | None,
    *,
    ranking: str | Ranking,
    num_classes: int | None,
    rejected: Counter[str],
    ranks: Ranks = ALONE,
) -> tuple[list[Ranked], SelectionData]:
    """Candidates, every source as it is among them, by what they gave on the selection images, best first.

    Those whose features tell no images apart are left out and counted in `rejected`. `labels` are the targets
    (`SelectionData`); `num_classes` None: as many as they say. `ranks` share the judging. Gives, too, what the ranking
    looked at.

    Raises:
        CalibrationError: If a source overflows on the selection images.
    """
    pairs = list(zip(candidates, outcomes, strict=True))
    of_sources = {c.recipe.fragments[-1].source: outcome.features for c, outcome in pairs if c.kind == "source"}
    for name, features in of_sources.items():
        if not bool(torch.isfinite(features).all()):
            num_bad = int((~torch.isfinite(features).all(1)).sum())
            raise CalibrationError(
                f"Source {name!r} gives NaN or infinite values at its end for {num_bad} of the {len(features)} images "
                f"to choose by: it overflows on them. Look at these images and the source's weights, or leave it out."
            )
    usable = [(c, outcome) for c, outcome in pairs if c.kind == "source" or _is_usable(outcome.features)]
    if len(usable) < len(pairs):
        rejected["features not finite or constant on the selection images"] = len(pairs) - len(usable)
    selection = SelectionData(
        outcomes=[outcome for _, outcome in usable],
        targets=labels,
        last_sources=[_last_source(c) for c, _ in usable],
        sources={_last_source(c): outcome for c, outcome in pairs if c.kind == "source"},
        num_classes=num_classes if num_classes is not None or labels is None else count_of(labels),
        ranks=ranks,
    )
    scores = find_ranking(ranking, labelled=labels is not None)([c for c, _ in usable], selection)
    ranked = []
    for number, ((candidate, outcome), score) in enumerate(zip(usable, scores, strict=True)):
        errors, losses = selection.errors.get(number), selection.losses.get(number)
        ranked.append(rank_one(candidate, score, outcome, errors, losses))
    return in_order(ranked), selection


def rank_one(
    candidate: Candidate,
    scores: Mapping[str, float],
    outcome: Outcome,
    errors: Tensor | None,
    losses: Tensor | None,
) -> Ranked:
    """A candidate with its scores, which its recipe gets, too."""
    figures = {name: float(value) for name, value in scores.items()}
    recipe = dataclasses.replace(candidate.recipe, scores={**figures, **candidate.recipe.scores})
    candidate = dataclasses.replace(candidate, recipe=recipe)
    return Ranked(candidate, figures, sum(x.shape[1] for x in outcome.vectors), outcome.seconds, errors, losses)


def in_order(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Candidates by their scores, best first."""
    # Equal scores keep the order of the search, in which the sources come first: a tie is no win over a source.
    return sorted(ranked, key=lambda r: tuple(-value for value in r.scores.values()))


def draw_rows(outcomes: Sequence[Outcome], labels: Tensor | None, seed: int) -> tuple[list[Outcome], Tensor | None]:
    """Outcomes and labels of at most `MAX_ROWS` of the images, drawn by the seed, in their order."""
    count = len(outcomes[0].vectors[0])
    if count <= MAX_ROWS:
        return list(outcomes), labels
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:MAX_ROWS].sort().values
    drawn: dict[int, Tensor] = {}  # a tensor that several candidates share stays one
    for outcome in outcomes:
        drawn |= {id(x): x[rows] for x in outcome.vectors if id(x) not in drawn}
    fewer = [dataclasses.replace(outcome, vectors=tuple(drawn[id(x)] for x in outcome.vectors)) for outcome in outcomes]
    return fewer, None if labels is None else labels[rows]


def _last_source(candidate: Candidate) -> str:
    end = next(tap.fragment for tap in reversed(candidate.recipe.taps))
    return candidate.recipe.fragments[end].source


def measure_candidates(
    ranked: Sequence[Ranked], budget: Budget, meters: Mapping[str, Callable[[Candidate], float]], progress: Progress
) -> list[Ranked]:
    """The same, those measured that keep all other limits of a budget, each until it is over one.

    `meters` are what measures a candidate, by measure ("activation_bytes", "latency_ms"), in this order.
    """
    progress.start("measuring", len(ranked))
    measured = []
    for r in ranked:
        if budget.allows(r.candidate.cost) and r.reaches(budget.min_score):
            for measure, meter in meters.items():
                r = r.with_measurement(measure, meter(r.candidate))
                if not _is_within(r, budget, measure):
                    break
        measured.append(r)
        progress.advance(1)
    return measured


def choose(
    ranked: Sequence[Ranked],
    budget: Budget,
    *,
    rejected: Mapping[str, int],
    seconds: Mapping[str, float],
    num_selection_labels: int,
    stopped: Stopped | None = None,
    peaks: dict[str, int] | None = None,
) -> SearchResult:
    """The result of a search: what keeps the budget, and the best of it.

    All candidates come best first, measured where the budget limits latency or activation bytes; `rejected` says
    how many compositions were turned down before, by reason.

    Raises:
        BudgetError: If none keeps the budget; names the one that comes nearest, and its cost.
    """
    fitting = [r for r in ranked if _objection(r, budget) is None]
    if not fitting:
        early = "" if stopped is None else f" {_IN_WORDS[stopped]}"
        raise BudgetError(f"The search found no network within the budget ({budget}){_nearest(ranked, budget)}{early}")
    reasons, returned = Counter(rejected), []
    for r in ranked:
        objection = None if r.candidate.kind in ("source", "self-stitched") else _objection(r, budget)
        if objection is None:
            returned.append(r)
        else:
            reasons[objection] += 1

    best_source = next(r for r in ranked if r.candidate.kind == "source")
    return SearchResult(
        ranked=tuple(returned),
        best=pick(fitting, budget),
        best_source=best_source,
        best_stitched=next((r for r in fitting if r.candidate.kind == "stitched"), None),
        rejected=dict(reasons),
        seconds=dict(seconds),
        num_selection_labels=num_selection_labels,
        min_score=budget.min_score,
        stopped=stopped,
        peaks=peaks or {},
    )


def pick(fitting: Sequence[Ranked], budget: Budget) -> Ranked:
    """The best of candidates, which come best first; with a least score the cheapest.

    The highest of a hundred scores on a few dozen images is in part luck. So of those that are not behind the first by
    more than one standard error over the images a whole source is taken, else the source ended early that sees the
    largest image and has the most MACs, else the first; and several side by side only where they are ahead of that by
    more than one standard error; one with stages likewise, by the images' losses (`scores_of_predictions`).
    """
    if budget.min_score is not None:
        return min(fitting, key=lambda r: r.candidate.cost.expected_macs)
    alone = [r for r in fitting if r.candidate.kind not in _COMPOUND] or fitting
    alike = [r for r in alone if r is alone[0] or not _is_ahead(alone[0], r)]
    sources = [r for r in alike if r.candidate.kind == "source"]
    ended = [r for r in alike if r.candidate.kind in ("early exit", "smaller image")]
    if sources:
        best = sources[0]
    elif ended:
        best = max(ended, key=lambda r: (_pixels(r), r.candidate.cost.macs))
    else:
        best = alone[0]
    best = next((r for r in fitting if r.candidate.kind == "side by side" and _is_ahead(r, best)), best)
    staged = [r for r in fitting if r.candidate.kind == "staged" and _loses_less(r, best)]
    return min(staged, key=lambda r: _sum_of(r.losses), default=best)


def _loses_less(r: Ranked, rival: Ranked) -> bool:
    """Whether the loss of one is less than another's by more than one standard error; unknown: no."""
    if r.losses is None or rival.losses is None:
        return False
    gain, error = gain_of(r.losses, rival.losses)
    return gain > error


def _sum_of(losses: Tensor | None) -> float:
    return math.inf if losses is None else float(losses.sum())


def _is_ahead(r: Ranked, rival: Ranked) -> bool:
    """Whether one is ahead of another by more than one standard error; where that is not known, yes."""
    gain, error = r.gain_over(rival)
    return gain > error or r.errors is None or rival.errors is None


def _pixels(r: Ranked) -> int:
    """Pixels of the smallest image that a candidate sees."""
    recipe = r.candidate.recipe
    roots = [fragment for fragment in recipe.fragments if fragment.parent is None]
    return min(math.prod(root.image_size or recipe.input_size[1:]) for root in roots)


def _objection(r: Ranked, budget: Budget) -> str | None:
    """Why a candidate does not keep a budget; None: it does."""
    if not budget.allows(r.candidate.cost):
        return "over the budget"
    if not r.reaches(budget.min_score):
        return "below the least score"
    return next((reason for measure, (_, reason) in _MEASURED.items() if not _is_within(r, budget, measure)), None)


def _nearest(ranked: Sequence[Ranked], budget: Budget) -> str:
    """What comes nearest to a budget that no candidate keeps, and what to do."""
    allowed = [r for r in ranked if budget.allows(r.candidate.cost)]
    if not allowed:
        cost = min((r.candidate.cost for r in ranked), key=lambda cost: cost.macs)
        return f"; the cheapest it found has {cost}. Raise the budget, or widen the search."
    fitting = [r for r in allowed if r.reaches(budget.min_score)]
    if not fitting:
        name = allowed[0].judged_by
        best = max(allowed, key=lambda r: r.scores[name])
        return (
            f": the highest {name} is {best.scores[name]:.4f} ({best}). Lower min_score, raise the other limits, or "
            f"widen the search."
        )
    for measure in _MEASURED:
        within = [r for r in fitting if _is_within(r, budget, measure)]
        if not within:
            break
        fitting = within
    lowest = min(fitting, key=lambda r: getattr(r, measure))
    return (
        f": of {len(fitting)} that were measured, the {_MEASURED[measure][0]} is over it ({lowest}). Raise "
        f"max_{measure}, or widen the search."
    )


def _is_within(r: Ranked, budget: Budget, measure: str) -> bool:
    """Whether there is no limit on what is measured, or it was measured and keeps it."""
    limit, value = budget.limits.get(measure), getattr(r, measure)
    return limit is None or (value is not None and value <= limit)


def _is_usable(features: Tensor) -> bool:
    """Whether a ranking can tell the images apart by these features."""
    return bool(torch.isfinite(features).all()) and bool((features != features[0]).any())
