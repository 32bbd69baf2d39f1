"""The steps of a search that a pool conducts: what compositions cost, composing, ranking, measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lightning_stitch.cutting import network_activation_bytes
from lightning_stitch.data import check_batch_labels
from lightning_stitch.errors import CutError
from lightning_stitch.io import Answer, Answers
from lightning_stitch.progress import Progress, counted, num_images, timed
from lightning_stitch.search import (
    ALONE,
    Beam,
    CompositionCosts,
    Outcome,
    Ranked,
    SearchSpace,
    Stopped,
    early_exits,
    measure_candidates,
    network_latency,
    on_smaller_images,
    outcomes_in_rounds,
    piece_latencies,
    rank_all,
    self_stitched,
    unmodified,
    until_stopped,
)
from lightning_stitch.settings import SearchSettings
from lightning_stitch.stitching import Batch, Candidate, Kind, Segmented, read_images, segment

if TYPE_CHECKING:
    from lightning_stitch.composing.pool import Pool


class SearchSteps:
    """What one search of a pool does, step by step; the times go into the pool's `seconds`.

    Args:
        pool: Whose sources are searched.
        settings: What to propose and by what to choose.
        num_classes: Number of classes, where there are labels.
        journal: Where answers are looked up and recorded.
        progress: Where to show progress.
    """

    def __init__(
        self, pool: Pool, settings: SearchSettings, *, num_classes: int | None, journal: Answers, progress: Progress
    ) -> None:
        self._pool, self._settings, self._num_classes = pool, settings, num_classes
        self._journal, self._progress = journal, progress
        self._ranks = pool.ranks

    def costs(self) -> tuple[CompositionCosts, CompositionCosts | None]:
        """What compositions cost, and sources on smaller images; refuses a budget that none can keep."""
        pool, settings = self._pool, self._settings
        exits = settings.exits and pool.settings.until == "features" and settings.ranking != "cka_product"
        longest = getattr(settings.strategy or Beam(), "max_fragments", 16)
        with timed(pool.seconds, "cut", pool.peaks):
            costs = CompositionCosts(pool.parts, bias=settings.bias, max_fragments=longest, early_exits=exits)
            smaller = None
            if exits and (parts := self._segment_smaller(settings.smaller_shapes(pool.image_shape))):
                smaller = CompositionCosts(parts, bias=settings.bias, max_fragments=1, early_exits=True)
            costs.check(settings.limits.of_static, *([smaller] if smaller else []))
        return costs, smaller

    def _segment_smaller(self, shapes: Sequence[tuple[int, int, int]]) -> list[Segmented]:
        """The sources for smaller images, those that take them; cut once."""
        pool = self._pool
        for shape in shapes:
            if shape not in pool.smaller:
                pool.smaller[shape] = []
                for part in pool.parts:
                    if not part.source.preprocessing.fixed_size:
                        with suppress(CutError):
                            pool.smaller[shape].append(segment(part.source, pool.settings, shape, resize=True))
                            pool.smaller[shape][-1].to(pool.device)
        return pool.all_parts[len(pool.parts) :]

    def time_pieces(self, costs: CompositionCosts, smaller: CompositionCosts | None) -> None:
        """Measure how long the pieces take, where the budget limits that."""
        pool, budget = self._pool, self._settings.limits.of_static
        if budget.max_latency_ms is None:
            return
        with timed(pool.seconds, "measure", pool.peaks):

            def recall(question: str, times: Callable[[], list[list[float]]]) -> list[list[float]]:
                hint = tuple[tuple[float, ...], ...]
                answer = partial(self._journal.recall, [question], lambda: Answer(times()), hint)
                return pool.ranks.of_first(lambda: list(answer().value))

            def here() -> list[list[float]]:
                return pool.latencies or piece_latencies(pool.parts, pool.device)

            pool.latencies = recall("latencies of the pieces", here)
            costs.time(pool.latencies)
            if smaller is not None:
                question = "latencies of the pieces on smaller images"
                smaller.time(recall(question, lambda: piece_latencies(smaller.parts, pool.device)))
            costs.check(budget, *([smaller] if smaller else []))

    def compose(self, space: SearchSpace, smaller: CompositionCosts | None) -> tuple[list[Candidate], Stopped | None]:
        """Sources, self-stitched, ended early or on smaller images, and StitchNets; and what ended the composing."""
        pool, settings, progress = self._pool, self._settings, self._progress
        with timed(pool.seconds, "search", pool.peaks):
            candidates, ends = unmodified(space), early_exits(space) if space.costs.early_exits else []
            if smaller is not None:
                ends += on_smaller_images(smaller.parts, smaller, settings.limits.of_all_images, before=pool.parts)
            progress.start("composing", settings.max_candidates)
            proposed = islice((settings.strategy or Beam())(space), settings.max_candidates)
            stopped = until_stopped(chain(self_stitched(space), counted(proposed, progress)), candidates)
            # In this order: of equal scores the first one wins.
            return sorted([*candidates, *ends], key=lambda c: get_args(Kind).index(c.kind)), stopped

    def rank(
        self, candidates: list[Candidate], selection: Iterable[Batch], space: SearchSpace
    ) -> tuple[list[Ranked], int]:
        """Run candidates over the selection images and rank them, best first; and how many labels that used."""
        pool, settings, labels = self._pool, self._settings, list[Tensor]()
        # Where a time limit or other processors gave ranks other candidates, each goes on by itself.
        self._ranks = pool.ranks if pool.ranks.agree([candidate.key for candidate in candidates]) else ALONE
        self._progress.start("ranking", num_images(selection))
        images = read_images(check_batch_labels(selection, self._num_classes), pool.image_shape, pool.device, labels)
        options: dict[str, Any] = {"num_classes": self._num_classes, "seed": pool.settings.seed, "ranks": self._ranks}

        def judge(candidates: Sequence[Candidate], outcomes: Sequence[Outcome], **more: Any) -> list[Ranked]:
            targets = torch.cat(labels) if labels else None
            return rank_all(candidates, outcomes, targets, pool.all_parts, settings, **options, **more)

        going, outcomes = outcomes_in_rounds(
            candidates,
            pool.all_parts,
            images,
            num_images(selection),
            partial(judge, compounds=False, rejected=Counter()) if isinstance(settings.ranking, str) else None,
            labels=labels,
            journal=self._journal,
            remembered=pool.remembered,
            rejected=space.rejected,
            ranks=self._ranks,
            on_batch=self._progress.advance,
        )
        ranked = judge(going, outcomes, compounds=space.costs.early_exits, rejected=space.rejected)
        return ranked, sum(map(len, labels))

    def measure(self, ranked: list[Ranked]) -> list[Ranked]:
        """The same, assembled and measured in what the budget limits and only an assembled network shows."""
        pool, budget = self._pool, self._settings.limits

        def activation_bytes(candidate: Candidate) -> float:
            return network_activation_bytes(pool.assemble(candidate), pool.image_shape)

        def latency(candidate: Candidate) -> float:
            def measure() -> Answer:
                return Answer(network_latency(pool.assemble(candidate).fused(), pool.image_shape, pool.device))

            answer = partial(self._journal.recall, ["latency", candidate.key], measure, float)
            return self._ranks.of_first(lambda: float(answer().value))

        meters = {"activation_bytes": activation_bytes, "latency_ms": latency}
        meters = {measure: meter for measure, meter in meters.items() if measure in budget.limits}
        if not meters:
            return ranked
        with timed(pool.seconds, "measure", pool.peaks):
            return measure_candidates(ranked, budget, meters, self._progress)
