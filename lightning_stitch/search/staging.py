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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor

from lightning_stitch.cost import Budget
from lightning_stitch.heads import confidence, log_residuals, task_of
from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import (
    SelectionData,
    gram_of_taps,
    predict_left_out,
    scores_of_predictions,
    squared_errors,
)
from lightning_stitch.search.results import Ranked, gain_of, rank_one
from lightning_stitch.search.sides import join, join_outcomes
from lightning_stitch.stages import OperatingPoint, Stages
from lightning_stitch.stitching import Candidate, Segmented

_MOST_FRONTS = 6
_MOST_ON = 4  # ways on that are tried of each kind: the same source's, others'
_MOST_BEGUN = 3  # of the best so far that are tried with one stage more
_STEPS = 16  # shares of the images that reach a stage which are tried to go on
_MOST_POINTS = 24


@dataclass(frozen=True, slots=True, eq=False)
class _Judged:
    """What a readout says of images left out of its head's fit.

    Attributes:
        predictions: Of the targets' columns (images x columns).
        errors: Each image's squared error (images,), as a share of the targets' variance, as the ranking has it.
        losses: Each image's loss (images,), by which settings are judged: `SelectionData.losses`.
        sure: How sure it is of each image (images,).
        figures: Accuracy, and how well confidence tells right from wrong, of classes (`Stages.figures`).
    """

    predictions: Tensor
    errors: Tensor
    losses: Tensor
    sure: Tensor
    figures: dict[str, float]

    @classmethod
    def of(cls, gram: Tensor, selection: SelectionData, *, soft: bool) -> _Judged:
        """Of a readout by its Gram matrix; `soft`: errors are those of softened labels."""
        columns, targets = selection.columns, selection.targets
        assert targets is not None
        wanted = selection.softened if soft else columns
        predictions, *softened = predict_left_out(gram, columns, *([wanted] if soft else []))
        task, figures = task_of(targets), {}
        if task == "regression":
            residuals = log_residuals(predictions, columns)[:, None]
            sure = confidence(predict_left_out(gram, residuals)[0], task)
        else:
            sure = confidence(predictions - 0.5, task)  # labels are 0 and 1 here, logits in a head
        if task == "multiclass":
            right = predictions.argmax(1) == columns.argmax(1)
            figures["loo_accuracy"] = float(right.double().mean())
            if 0 < figures["loo_accuracy"] < 1:
                # Imported here: it brings matplotlib along, which a search does without.
                auroc = import_module("torchmetrics.functional.classification").binary_auroc
                figures["confidence_auroc"] = float(auroc(sure.float(), right.long()))
        errors = squared_errors(softened[0] if soft else predictions, wanted)
        losses = scores_of_predictions(predictions, selection)[1]
        return cls(predictions, errors, errors if losses is None else losses, sure, figures)


@dataclass(frozen=True, eq=False)
class _Stage:
    """All that has run by then, what its taps gave, and what that says of images left out.

    The Gram matrix is made where a stage is gone on from, not kept of each that is tried.
    """

    candidate: Candidate
    outcome: Outcome
    judged: _Judged

    @cached_property
    def gram(self) -> Tensor:
        """Of its taps (images x images)."""
        return gram_of_taps(self.outcome, self.outcome.keys)


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """Shares of the images that reach each stage but the last which go on, what that costs on average, and loses."""

    goes_on: tuple[float, ...]
    mean_macs: float
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class StagedNetwork:
    """Stages in a row at the setting that loses least within a budget.

    Attributes:
        stages: From the first to the last.
        settings: All that were tried.
        setting: The one of least loss.
    """

    stages: tuple[_Stage, ...]
    settings: tuple[_Setting, ...]
    setting: _Setting


class Staging:
    """Candidates as stages of networks, judged on the selection images by what is known of them.

    Args:
        selection: What candidates were ranked by, with labels.
        outcomes: What they gave, by their keys.
        parts: The sources that their steps refer to.
        budget: Limits that all networks keep, one on average MACs among them.
        soft: Whether errors are those of softened labels, as the ranking has them.
    """

    def __init__(
        self,
        selection: SelectionData,
        outcomes: Mapping[str, Outcome],
        parts: Sequence[Segmented],
        budget: Budget,
        *,
        soft: bool,
    ) -> None:
        assert budget.mean_macs is not None
        self.mean_macs, self.limits = budget.mean_macs, budget.of_all_images
        self._selection, self._outcomes, self._parts, self._soft = selection, outcomes, parts, soft
        self._known: dict[frozenset[str], _Judged] = {}

    def begin(self, front: Candidate) -> tuple[_Stage, ...]:
        """A front as a first stage."""
        outcome = self._outcomes[front.key]
        return (_Stage(front, outcome, self._judge(outcome, lambda: gram_of_taps(outcome, outcome.keys))),)

    def extend(self, stages: tuple[_Stage, ...], way_on: Candidate) -> StagedNetwork | None:
        """The network that goes on to a candidate where the stages so far are unsure.

        None where that reads nothing more, or no setting at which an image goes on keeps the budget.
        """
        before = stages[-1]
        joined = join(before.candidate, way_on, self._parts)
        if joined is None or not self.limits.allows(joined.cost):
            return None
        outcome = join_outcomes(before.outcome, self._outcomes[way_on.key], joined)
        more = {*outcome.keys} - {*before.outcome.keys}
        judged = self._judge(outcome, lambda: before.gram + gram_of_taps(outcome, more))
        whole = (*stages, _Stage(joined, outcome, judged))
        settings = tuple(_settings(whole))
        within = [s for s in settings if s.mean_macs <= self.mean_macs and s.goes_on[-1] > 0]
        return StagedNetwork(whole, settings, min(within, key=lambda s: s.loss)) if within else None

    def ranked(self, network: StagedNetwork) -> Ranked:
        """A network as a candidate with scores."""
        points, last = _points(network), network.stages[-1].candidate
        stops = _stops(network.stages, network.setting.goes_on)
        each = torch.arange(len(stops))
        errors = torch.stack([stage.judged.errors for stage in network.stages])[stops, each]
        losses = torch.stack([stage.judged.losses for stage in network.stages])[stops, each]
        predictions = torch.stack([stage.judged.predictions for stage in network.stages])[stops, each]
        scores = {"loo_soft_r2": 1 - float(errors.sum())} if self._soft else {}
        scores |= scores_of_predictions(predictions, self._selection)[0]
        stages = Stages(
            taps=tuple(len(stage.candidate.reads) for stage in network.stages),
            macs=tuple(stage.candidate.cost.macs for stage in network.stages),
            points=tuple(OperatingPoint(s.goes_on, s.mean_macs, {"neg_loo_loss": -s.loss}) for s in points),
            point=points.index(network.setting),
            figures=tuple(stage.judged.figures for stage in network.stages),
        )
        mean = {"mean_macs": network.setting.mean_macs}
        recipe = dataclasses.replace(last.recipe, stages=stages, scores={**last.recipe.scores, **mean})
        cost = dataclasses.replace(last.cost, **mean)  # type: ignore[arg-type]
        candidate = dataclasses.replace(last, recipe=recipe, kind="staged", cost=cost)
        return rank_one(candidate, scores, network.stages[-1].outcome, errors, losses)

    def _judge(self, outcome: Outcome, gram: Callable[[], Tensor]) -> _Judged:
        """What taps say, in whatever order; made once."""
        read = frozenset(outcome.keys)
        if read not in self._known:
            self._known[read] = _Judged.of(gram(), self._selection, soft=self._soft)
        return self._known[read]


def staged(
    ranked: Sequence[Ranked],
    selection: SelectionData,
    outcomes: Mapping[str, Outcome],
    parts: Sequence[Segmented],
    budget: Budget,
    *,
    max_stages: int,
) -> list[Ranked]:
    """The network of two stages that loses least within a budget's mean, and of more where each is worth it.

    What counts is the loss of images left out, against softened labels (`SelectionData.losses`): squared errors are
    large where a head half way is right already, and labels alone are too noisy where there are few. A stage more is
    worth it where it lowers the loss by more than one standard error of that over the images.

    Args:
        ranked: Candidates, best first.
        selection: What they were ranked by, with labels.
        outcomes: What they gave, by their keys.
        parts: The sources that their steps refer to.
        budget: Limits that all keep, one on average MACs among them.
        max_stages: Most stages.
    """
    single = [
        r
        for r in ranked
        if r.candidate.kind not in ("self-stitched", "side by side")
        and r.errors is not None
        and outcomes[r.candidate.key].blocks is not None
        and budget.of_all_images.allows(r.candidate.cost)
    ]
    if not single:
        return []
    staging = Staging(selection, outcomes, parts, budget, soft="loo_soft_r2" in single[0].scores)
    fronts = _front([r for r in single if r.candidate.cost.macs < staging.mean_macs])
    begun = [staging.begin(r.candidate) for r in _thinned(fronts, _MOST_FRONTS)]
    chosen: list[Ranked] = []
    for _ in range(max_stages - 1):
        trials = (staging.extend(stages, r.candidate) for stages in begun for r in _ways_on(single, stages[-1]))
        networks = sorted((trial for trial in trials if trial is not None), key=lambda trial: trial.setting.loss)
        if not networks:
            break
        best = staging.ranked(networks[0])
        if chosen:
            assert best.losses is not None
            assert chosen[-1].losses is not None
            gain, error = gain_of(best.losses, chosen[-1].losses)
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


def _settings(stages: Sequence[_Stage]) -> Iterator[_Setting]:
    """All settings on a grid of shares, coarser where there are few images or many stages."""
    num_images = len(stages[0].judged.losses)
    steps = max(2, min(_STEPS if len(stages) <= 3 else _STEPS // 2, num_images // 4))
    macs = [stage.candidate.cost.macs for stage in stages]
    losses, sure = [stage.judged.losses for stage in stages], [stage.judged.sure for stage in stages]

    def descend(stage: int, rows: Tensor) -> Iterator[tuple[tuple[float, ...], float, float]]:
        """Shares from a stage on, the sum of MACs and the sum of losses of these images."""
        if stage == len(stages) - 1 or len(rows) == 0:
            shares = (0.0,) * (len(stages) - 1 - stage)
            yield shares, len(rows) * macs[stage], float(losses[stage][rows].sum())
            return
        ordered = rows[sure[stage][rows].argsort()]
        for step in range(steps + 1):
            share = step / steps
            count = round(share * len(ordered))
            stop = ordered[count:]
            spent, lost = len(stop) * macs[stage], float(losses[stage][stop].sum())
            if count == 0 and step > 0:
                continue
            for shares, more_macs, more_lost in descend(stage + 1, ordered[:count]):
                yield (share, *shares), spent + more_macs, lost + more_lost

    for goes_on, spent, lost in descend(0, torch.arange(num_images)):
        yield _Setting(goes_on, spent / num_images, lost)


def _points(network: StagedNetwork) -> list[_Setting]:
    """The settings that nothing cheaper beats, from none that goes on, with the one in use; the cheapest first."""
    front: list[_Setting] = []
    for setting in sorted(network.settings, key=lambda s: (s.mean_macs, s.loss)):
        if not front or setting.loss < front[-1].loss:
            front.append(setting)
    whole = next(s for s in network.settings if math.prod(s.goes_on) == 1)
    places = torch.linspace(0, len(front) - 1, min(len(front), _MOST_POINTS)).round().int().tolist()
    points = {id(s): s for s in [*(front[place] for place in places), network.setting, whole]}
    return sorted(points.values(), key=lambda s: s.mean_macs)


def _stops(stages: Sequence[_Stage], goes_on: Sequence[float]) -> Tensor:
    """The stage at which each image stops (images,)."""
    stops = torch.full((len(stages[0].judged.losses),), len(stages) - 1)
    rows = torch.arange(len(stops))
    for stage, share in enumerate(goes_on):
        ordered = rows[stages[stage].judged.sure[rows].argsort()]
        count = round(share * len(ordered))
        stops[ordered[count:]] = stage
        rows = ordered[:count]
    return stops
