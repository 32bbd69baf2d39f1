"""Candidates over the selection images in rounds, so that most stitched ones do not run over all of them.

All run over a quarter of the images, 128 at most, the better half of the stitched ones over twice as many, the better
half of these over twice as many again, and from half of the images on what is left over all (successive halving:
Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"). Halves are taken
among candidates of about the same cost, and what nothing cheaper beats stays, so that every budget keeps some. Sources
and what comes out of their own passes stay. Each image is read once, and nothing runs twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Answers
from lightning_stitch.search.evaluation import Outcome, Remembered, outcomes
from lightning_stitch.search.ranks import ALONE, Ranks
from lightning_stitch.search.results import Ranked
from lightning_stitch.stitching import Candidate, Segmented

_FIRST_ROUND = (64, 128)  # images: fewer tell too little apart, more are not needed to
_GROUP = 4  # candidates of about the same cost, of which half goes on
_STITCHED = ("stitched", "shortened")

Judge = Callable[[Sequence[Candidate], Sequence[Outcome]], Sequence[Ranked]]
"""Ranks candidates, best first, by what they gave of the images so far."""


def outcomes_in_rounds(
    candidates: Sequence[Candidate],
    parts: Sequence[Segmented],
    images: Iterable[Tensor],
    num_images: int | None,
    judge: Judge | None,
    *,
    labels: Sequence[Tensor] = (),
    journal: Answers,
    remembered: Remembered,
    rejected: Counter[str],
    ranks: Ranks = ALONE,
    on_batch: Callable[[int], None],
) -> tuple[list[Candidate], list[Outcome]]:
    """Those that ran over all images, in their order, and what they gave.

    Args:
        candidates: What is to be ranked.
        parts: The sources that their steps refer to.
        images: Batches of images.
        num_images: How many images they are; None, or too few: there are no rounds.
        judge: Says who goes on; None: all do.
        labels: Of the batches so far, where there are labels: while images come in the order of their classes, which
            says nothing of those to come, all go on.
        journal: Where what they give is looked up and recorded.
        remembered: Takes in what they gave.
        rejected: Counts those that are left out, by reason.
        ranks: Who shares the work.
        on_batch: Called with the number of images after each batch.
    """
    alive, sizes, stream = list(candidates), list[int](), iter(images)
    rounds = rounds_of(num_images) if judge is not None and num_images is not None else []

    def count(size: int) -> None:
        sizes.append(size)
        on_batch(size)

    def run(batches: Iterable[Tensor]) -> list[Outcome]:
        options: dict[str, Any] = {"journal": journal, "remembered": remembered, "remember": True, "on_batch": count}
        return outcomes(alive, parts, batches, first_batch=len(sizes), ranks=ranks, **options)

    given: list[Outcome] = []
    for limit in rounds:
        first = next(stream, None)
        if first is None:
            break
        given = run(chain([first], _until(stream, limit - sum(sizes) - len(first))))
        assert judge is not None
        going = alive if labels and in_order_of_class(torch.cat(list(labels))) else going_on(alive, given, judge)
        if leaving := len(alive) - len(going):
            rejected[f"behind others of about the same cost after {sum(sizes)} images"] += leaving
        stay = {candidate.key for candidate in going}
        given = [outcome for candidate, outcome in zip(alive, given, strict=True) if candidate.key in stay]
        alive = going
    first = next(stream, None)
    if first is not None or not given:
        given = run([] if first is None else chain([first], stream))
    return alive, given


def rounds_of(num_images: int) -> list[int]:
    """After how many images half of the stitched ones is left, each time twice as many; of fewer than 256 never."""
    fewest, most = _FIRST_ROUND
    limit, limits = min(num_images // 4, most), list[int]()
    while fewest <= limit <= num_images // 2:
        limits.append(limit)
        limit *= 2
    return limits


def in_order_of_class(labels: Tensor) -> bool:
    """Whether images follow others of their class far more often than if they were shuffled; only classes have orders.

    Of shuffled images a share of sum(p^2) follows one of its class, p the shares of the classes.
    """
    if labels.is_floating_point() or labels.ndim != 1 or len(labels) < 2:
        return False
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    expected = float(shares.square().sum())
    found = float((labels[1:] == labels[:-1]).double().mean())
    return found > expected + 4 * math.sqrt(expected * (1 - expected) / len(labels))


def _until(stream: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Batches until there are so many images."""
    while count > 0 and (batch := next(stream, None)) is not None:
        count -= len(batch)
        yield batch


def going_on(alive: Sequence[Candidate], given: Sequence[Outcome], judge: Judge) -> list[Candidate]:
    """All but the worse half of the stitched ones, within groups of about the same cost."""
    stitched = [candidate for candidate in alive if candidate.kind in _STITCHED]
    if len(stitched) <= _GROUP:
        return list(alive)
    # Sources are what a ranking compares with; the others' places say nothing of the stitched ones'.
    judged = [pair for pair in zip(alive, given, strict=True) if pair[0].kind in ("source", *_STITCHED)]
    try:
        ranked = judge([candidate for candidate, _ in judged], [outcome for _, outcome in judged])
    except CalibrationError:  # these images tell too little, as those of one class
        return list(alive)
    place = {r.candidate.key: number for number, r in enumerate(ranked)}
    last = len(place)
    leaving: set[str] = set()
    by_cost = sorted(stitched, key=lambda candidate: candidate.cost.macs)
    for start in range(0, len(by_cost), _GROUP):
        group = sorted(by_cost[start : start + _GROUP], key=lambda candidate: place.get(candidate.key, last))
        leaving.update(candidate.key for candidate in group[(len(group) + 1) // 2 :])
    front: set[str] = set()  # of each kind what nothing cheaper of it beats: some budget would choose it
    best: dict[str, int] = {}
    for candidate in by_cost:
        if place.get(candidate.key, last) < best.get(candidate.kind, last + 1):
            best[candidate.kind] = place.get(candidate.key, last)
            front.add(candidate.key)
    return [candidate for candidate in alive if candidate.key not in leaving - front]
