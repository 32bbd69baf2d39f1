"""Compositions that stop when they are sure: stages and their thresholds, chosen together by leave-one-out.

Nothing runs for it. A stage reads all taps so far, so that its answers on images left out of its fit come from the sum
of their Gram matrices, and these say how sure it is of images that it has not seen: what any thresholds would cost, and
how right they would be, is known without a further label. Fronts are what costs less than the budget has on average;
the unsure go on to the rest of the same source, through a stitch into another's late blocks, to another source, or to a
larger image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_stitch.cost import Budget
from lightning_stitch.heads import confidence, log_residuals, task_of
from lightning_stitch.recipe import Recipe
from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import (
    SelectionData,
    gram_of_taps,
    predict_left_out,
    scores_of_predictions,
    squared_errors,
)
from lightning_stitch.search.results import Ranked, rank_one
from lightning_stitch.search.sides import join, join_outcomes
from lightning_stitch.stages import OperatingPoint, Stages
from lightning_stitch.stitching import Candidate, Segmented

_MOST_FRONTS = 6
_MOST_ON = 4  # ways on that are tried of each kind: the same source's, others'
_MOST_BEGUN = 3  # of the best so far that are tried with one stage more
_STEPS = 16  # shares of the images that reach a stage which are tried to go on
_MOST_POINTS = 24


@dataclass(frozen=True, eq=False)
class _Stage:
    """What a readout says of images left out of its head's fit, and what it costs.

    Attributes:
        candidate: All that has run by then.
        outcome: What its taps gave.
        gram: Their Gram matrix.
        selection: Targets, and what they are compared with.
        soft: Whether errors are those of softened labels, as the ranking has them.
    """

    candidate: Candidate
    outcome: Outcome
    gram: Tensor
    selection: SelectionData
    soft: bool

    @cached_property
    def predictions(self) -> tuple[Tensor, Tensor]:
        """Of the targets' columns, and of what errors are of (images x columns each)."""
        columns = self.selection.columns
        if not self.soft:
            (predictions,) = predict_left_out(self.gram, columns)
            return predictions, predictions
        predictions, softened = predict_left_out(self.gram, columns, self.selection.softened)
        return predictions, softened

    @cached_property
    def errors(self) -> Tensor:
        """Each image's squared error (images,), as a share of the targets' variance."""
        return squared_errors(self.predictions[1], self.selection.softened if self.soft else self.selection.columns)

    @cached_property
    def sure(self) -> Tensor:
        """How sure it is of each image (images,)."""
        assert self.selection.targets is not None
        task, predictions = task_of(self.selection.targets), self.predictions[0]
        if task == "regression":
            residuals = log_residuals(predictions, self.selection.columns)[:, None]
            return confidence(predict_left_out(self.gram, residuals)[0], task)
        return confidence(predictions - 0.5, task)  # labels are 0 and 1 here, logits in a head


@dataclass(frozen=True, eq=False)
class _Network:
    """Stages in a row at the setting that errs least within a budget.

    Attributes:
        stages: From the first to the last.
        settings: All that were tried.
        place: Which of them it is.
    """

    stages: tuple[_Stage, ...]
    settings: tuple[_Setting, ...]
    place: int

    @property
    def setting(self) -> _Setting:
        """The setting that errs least."""
        return self.settings[self.place]


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """Shares of the images that reach each stage but the last which go on, what that costs on average, and errs."""

    goes_on: tuple[float, ...]
    mean_macs: float
    error: float


def staged(
    ranked: Sequence[Ranked],
    selection: SelectionData,
    outcomes: Mapping[str, Outcome],
    parts: Sequence[Segmented],
    budget: Budget,
    *,
    max_stages: int,
) -> list[Ranked]:
    """The network of two stages that errs least within a budget's mean, and of more where each is worth it.

    A stage more is worth it where it lowers the squared error of the images left out by more than one standard error of
    that over the images.

    Args:
        ranked: Candidates, best first.
        selection: What they were ranked by, with labels.
        outcomes: What they gave, by their keys.
        parts: The sources that their steps refer to.
        budget: Limits that all keep, one on average MACs among them.
        max_stages: Most stages.
    """
    assert budget.mean_macs is not None
    allowed = [
        r
        for r in ranked
        if r.candidate.kind not in ("self-stitched", "side by side") and budget.of_all_images.allows(r.candidate.cost)
    ]
    if not allowed or allowed[0].errors is None:
        return []
    soft = "loo_soft_r2" in allowed[0].scores
    begun: list[tuple[_Stage, ...]] = [
        (_Stage(r.candidate, outcome, gram_of_taps(outcome, outcome.keys), selection, soft),)
        for r in _thinned(_front([r for r in allowed if r.candidate.cost.macs < budget.mean_macs]), _MOST_FRONTS)
        if (outcome := outcomes[r.candidate.key]).blocks is not None
    ]
    chosen: list[Ranked] = []
    known: dict[frozenset[str], _Stage] = {}
    for _ in range(max_stages - 1):
        networks = [
            network
            for stages in begun
            for r in _ways_on(allowed, stages[-1])
            if (stage := _next(stages[-1], r.candidate, outcomes, parts, known)) is not None
            and budget.of_all_images.allows(stage.candidate.cost)
            and (network := _settle((*stages, stage), budget.mean_macs)) is not None
        ]
        if not networks:
            break
        networks.sort(key=lambda network: network.setting.error)
        best = _ranked(networks[0], selection)
        gain, error = best.gain_over(chosen[-1]) if chosen else (1.0, 0.0)
        if gain <= error:
            break
        chosen.append(best)
        begun = [network.stages for network in networks[:_MOST_BEGUN]]
    return chosen


def _front(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Those that nothing cheaper beats, the cheapest first."""
    front: list[Ranked] = []
    for r in sorted(ranked, key=lambda r: (r.candidate.cost.macs, -r.score)):
        if not front or r.score > front[-1].score:
            front.append(r)
    return front


def _thinned(ranked: Sequence[Ranked], count: int) -> list[Ranked]:
    """At most so many, evenly, the last among them."""
    places = torch.linspace(len(ranked) - 1, 0, min(len(ranked), count)).round().int().tolist()
    return [ranked[place] for place in reversed(places)]


def _ways_on(allowed: Sequence[Ranked], stage: _Stage) -> list[Ranked]:
    """Where unsure images may go: on from what has run, and to the best of each other choice of sources and size."""
    had = set(stage.outcome.keys)
    dearer = [r for r in allowed if not set(keys_of_reads(r.candidate)) <= had]
    rest = _thinned(_front([r for r in dearer if had <= set(keys_of_reads(r.candidate))]), _MOST_ON)
    others: dict[tuple[object, ...], Ranked] = {}
    for r in dearer:
        others.setdefault(tuple(step.source for step in r.candidate.steps), r)
    return list({r.candidate.key: r for r in [*rest, *list(others.values())[:_MOST_ON]]}.values())


def _next(
    stage: _Stage,
    candidate: Candidate,
    outcomes: Mapping[str, Outcome],
    parts: Sequence[Segmented],
    known: dict[frozenset[str], _Stage],
) -> _Stage | None:
    """The stage behind another that reads a candidate, too; None where that has nothing more."""
    joined = join(stage.candidate, candidate, parts)
    if joined is None:
        return None
    outcome = join_outcomes(stage.outcome, outcomes[candidate.key], joined)
    read = frozenset(outcome.keys)
    like = known.get(read)
    if like is not None:  # the same readout, perhaps in another order
        following = dataclasses.replace(like, candidate=joined, outcome=outcome)
        following.__dict__.update({name: x for name, x in like.__dict__.items() if name in _CACHED})
        return following
    gram = stage.gram + gram_of_taps(outcome, {*outcome.keys} - {*stage.outcome.keys})
    known[read] = following = _Stage(joined, outcome, gram, stage.selection, stage.soft)
    following.errors, following.sure  # noqa: B018  (known from now on)
    return following


_CACHED = ("predictions", "errors", "sure")


def _settle(stages: tuple[_Stage, ...], mean_macs: float) -> _Network | None:
    """The stages at the setting of least error within a mean; None where there is none, or all stop at the first."""
    settings = tuple(_settings(stages))
    within = [place for place, s in enumerate(settings) if s.mean_macs <= mean_macs and s.goes_on[-1] > 0]
    if not within:
        return None
    return _Network(stages, settings, min(within, key=lambda place: settings[place].error))


def _settings(stages: Sequence[_Stage]) -> Iterator[_Setting]:
    """All settings on a grid of shares, coarser where there are few images or many stages."""
    num_images = len(stages[0].errors)
    steps = max(2, min(_STEPS if len(stages) <= 3 else _STEPS // 2, num_images // 4))
    macs = [stage.candidate.cost.macs for stage in stages]
    errors, sure = [stage.errors for stage in stages], [stage.sure for stage in stages]

    def descend(stage: int, rows: Tensor) -> Iterator[tuple[tuple[float, ...], float, float]]:
        """Shares from a stage on, the sum of MACs and the sum of errors of these images."""
        if stage == len(stages) - 1 or len(rows) == 0:
            shares = (0.0,) * (len(stages) - 1 - stage)
            yield shares, len(rows) * macs[stage], float(errors[stage][rows].sum())
            return
        ordered = rows[sure[stage][rows].argsort()]
        for step in range(steps + 1):
            share = step / steps
            count = round(share * len(ordered))
            stop = ordered[count:]
            spent, erred = len(stop) * macs[stage], float(errors[stage][stop].sum())
            if count == 0 and step > 0:
                continue
            for shares, more_macs, more_errors in descend(stage + 1, ordered[:count]):
                yield (share, *shares), spent + more_macs, erred + more_errors

    for goes_on, spent, erred in descend(0, torch.arange(num_images)):
        yield _Setting(goes_on, spent / num_images, erred)


def _ranked(network: _Network, selection: SelectionData) -> Ranked:
    """A network with stages as a candidate with scores."""
    first, last = network.stages[0], network.stages[-1]
    points = _points(network)
    of_image = _stops(network.stages, network.setting.goes_on)
    each = torch.arange(len(of_image))
    errors = torch.stack([stage.errors for stage in network.stages])[of_image, each]
    predictions = torch.stack([stage.predictions[0] for stage in network.stages])[of_image, each]
    scores = {"loo_soft_r2": 1 - float(errors.sum())} if first.soft else {}
    scores |= scores_of_predictions(predictions, selection)
    stages = Stages(
        taps=tuple(len(stage.candidate.reads) for stage in network.stages),
        macs=tuple(stage.candidate.cost.macs for stage in network.stages),
        points=tuple(OperatingPoint(s.goes_on, s.mean_macs, {next(iter(scores)): 1 - s.error}) for s in points),
        point=points.index(network.setting),
    )
    mean_macs = network.setting.mean_macs
    recipe: Recipe = dataclasses.replace(
        last.candidate.recipe, stages=stages, scores={**last.candidate.recipe.scores, "mean_macs": mean_macs}
    )
    cost = dataclasses.replace(last.candidate.cost, mean_macs=mean_macs)
    candidate = dataclasses.replace(last.candidate, recipe=recipe, kind="staged", cost=cost)
    return rank_one(candidate, scores, last.outcome, errors)


def _points(network: _Network) -> list[_Setting]:
    """The settings that nothing cheaper beats, from none that goes on, with the one in use; the cheapest first."""
    front: list[_Setting] = []
    for setting in sorted(network.settings, key=lambda s: (s.mean_macs, s.error)):
        if not front or setting.error < front[-1].error:
            front.append(setting)
    whole = next(s for s in network.settings if math.prod(s.goes_on) == 1)
    places = torch.linspace(0, len(front) - 1, min(len(front), _MOST_POINTS)).round().int().tolist()
    points = {id(s): s for s in [*(front[place] for place in places), network.setting, whole]}
    return sorted(points.values(), key=lambda s: s.mean_macs)


def _stops(stages: Sequence[_Stage], goes_on: Sequence[float]) -> Tensor:
    """The stage at which each image stops (images,)."""
    stops = torch.full((len(stages[0].errors),), len(stages) - 1)
    rows = torch.arange(len(stops))
    for stage, share in enumerate(goes_on):
        ordered = rows[stages[stage].sure[rows].argsort()]
        count = round(share * len(ordered))
        stops[ordered[count:]] = stage
        rows = ordered[:count]
    return stops
