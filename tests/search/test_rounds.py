"""Rounds: the worse half of the stitched candidates stops early, and the best is found all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from doubles.small_sources import donor
from doubles.tensors import digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import CalibrationSettings, Pool, SearchResult
from lightning_stitch.io import Answers
from lightning_stitch.progress import Silent
from lightning_stitch.search import Outcome, Ranked, Remembered, outcomes_in_rounds
from lightning_stitch.search.rounds import in_order_of_class, rounds_of
from lightning_stitch.stitching import Candidate

SHAPE = (3, 32, 32)
IMAGES, LABELS = digits(336, 32, first=20, classes=4)
CALIBRATION = [IMAGES[:16]]
STITCHED = ("stitched", "shortened")


def loader(count: int = 320, *, in_order: bool = False, batch_size: int = 32) -> DataLoader:
    images, labels = IMAGES[16 : 16 + count], LABELS[16 : 16 + count]
    if in_order:
        images, labels = images[labels.argsort(stable=True)], labels.sort().values
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def new_pool() -> Pool:
    return Pool([donor("test_resnet"), donor("test_efficientnet")], SHAPE, settings=CalibrationSettings("stages"))


@cache
def pool() -> Pool:
    return new_pool()


@cache
def in_rounds() -> SearchResult:
    return pool().search(CALIBRATION, loader(), max_candidates=12)


@cache
def at_once() -> SearchResult:
    """The same, of images that do not say how many they are."""
    return new_pool().search(CALIBRATION, list(loader()), max_candidates=12)


def stitched(result: SearchResult) -> dict[str, Ranked]:
    return {r.candidate.recipe.path: r for r in result.ranked if r.candidate.kind in STITCHED}


def test_three_in_four_stitched_ones_do_not_run_over_all_images_and_are_counted() -> None:
    kept, there = stitched(in_rounds()), stitched(at_once())
    assert set(kept) < set(there)
    assert len(kept) <= len(there) / 2
    reasons = {reason: count for reason, count in in_rounds().rejected.items() if "about the same cost" in reason}
    assert sum(reasons.values()) == len(there) - len(kept)
    assert "behind others of about the same cost after 96 images" in reasons
    assert not [reason for reason in at_once().rejected if "about the same cost" in reason]


def test_the_cheapest_of_each_kind_stays_for_the_smallest_budget() -> None:
    for kind in STITCHED:
        of_kind = [r for r in stitched(at_once()).values() if r.candidate.kind == kind]
        cheapest = min(of_kind, key=lambda r: r.candidate.cost.macs)
        assert cheapest.candidate.recipe.path in stitched(in_rounds())


def test_what_goes_on_has_the_scores_of_all_images_and_all_else_is_there() -> None:
    kept, there = stitched(in_rounds()), stitched(at_once())
    for path, ranked in kept.items():
        assert ranked.scores == pytest.approx(there[path].scores, abs=1e-6)
    others = [
        {r.candidate.recipe.path: r.score for r in result.ranked if r.candidate.kind not in (*STITCHED, "side by side")}
        for result in (in_rounds(), at_once())
    ]
    assert others[0] == pytest.approx(others[1], abs=1e-6)


def test_the_winner_is_that_of_all_images_or_one_within_its_standard_error() -> None:
    first, second = in_rounds().best_stitched, at_once().best_stitched
    assert first is not None
    assert second is not None
    gain, error = second.gain_over(first)
    assert gain <= error


def test_a_search_in_rounds_repeats_and_goes_on_from_its_journal(tmp_path: Path) -> None:
    paths = [r.candidate.recipe.path for r in in_rounds().ranked]
    for _ in range(2):
        again = new_pool().search(CALIBRATION, loader(), max_candidates=12, journal=tmp_path / "journal")
        assert [r.candidate.recipe.path for r in again.ranked] == paths
        assert again.rejected == in_rounds().rejected


def test_images_in_the_order_of_their_classes_lose_nothing_by_what_one_class_says() -> None:
    result = new_pool().search(CALIBRATION, loader(in_order=True), max_candidates=12)
    reasons = [reason for reason in result.rejected if "about the same cost" in reason]
    assert not reasons
    shuffled = torch.randint(4, (80,), generator=torch.Generator().manual_seed(0))
    assert not in_order_of_class(shuffled)
    assert in_order_of_class(shuffled.sort().values)
    assert not in_order_of_class(torch.zeros(80, dtype=torch.int64))  # one class alone has no order
    assert not in_order_of_class(shuffled.float())


def test_rounds_double_from_a_quarter_of_the_images_and_from_128_at_most() -> None:
    doubled = [128, 256, 512, 1024, 2048]
    expected = {255: [], 256: [64, 128], 384: [96, 192], 512: [128, 256], 1023: [128, 256], 4096: doubled}
    assert {count: rounds_of(count) for count in expected} == expected


def test_few_images_or_few_candidates_have_no_rounds() -> None:
    for count, most, left in ((128, 12, len(stitched(at_once()))), (320, 4, 4)):
        result = new_pool().search(CALIBRATION, loader(count), max_candidates=most)
        assert not [reason for reason in result.rejected if "about the same cost" in reason]
        assert len(stitched(result)) == left


def test_heads_do_not_run_again_what_chose() -> None:
    fresh = new_pool()
    result = fresh.search(CALIBRATION, loader(), max_candidates=12)
    best = next(r.candidate for r in result.ranked if r.candidate.kind in STITCHED)
    for part in fresh.parts:
        part._fused = [_Refuses() for _ in part.pieces]  # type: ignore[misc]
    outcome, labels = fresh.outcomes([best], loader(batch_size=50), progress=Silent())
    network = pool().assemble(best)
    with torch.no_grad():
        torch.testing.assert_close(outcome[0].features, network(IMAGES[16:336]), rtol=1e-3, atol=1e-3)
    assert labels is not None
    assert torch.equal(labels, LABELS[16:336])


class _Refuses(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it ran again")


def test_of_each_four_of_about_the_same_cost_two_go_on_and_the_cheapest_of_each_kind() -> None:
    everything = [r.candidate for r in at_once().ranked if r.candidate.kind != "side by side"]
    asked: list[int] = []

    def by_cost(candidates: Sequence[Candidate], given: Sequence[Outcome]) -> list[Ranked]:
        asked.append(len(given[0].vectors[0]))
        ranked = [Ranked(c, {"cheap": -float(c.cost.macs)}, 0, 0.0) for c in candidates]
        return sorted(ranked, key=lambda r: -r.score)

    rejected: Counter[str] = Counter()
    going, given = outcomes_in_rounds(
        everything,
        pool().all_parts,
        IMAGES[16:336].split(40),
        320,
        by_cost,
        journal=Answers(),
        remembered=Remembered(),
        rejected=rejected,
        on_batch=lambda count: None,
    )
    assert asked == [80, 160]
    assert [len(outcome.vectors[0]) for outcome in given] == [320] * len(going)
    by_macs = sorted((c for c in everything if c.kind in STITCHED), key=lambda c: c.cost.macs)
    cheapest = {next(c.key for c in by_macs if c.kind == kind) for kind in STITCHED}
    expected = by_macs
    for _ in range(2):
        groups = [expected[start : start + 4] for start in range(0, len(expected), 4)]
        halves = {c.key for group in groups for c in group[: (len(group) + 1) // 2]}
        expected = [c for c in expected if c.key in halves or c.key in cheapest]
    assert {c.key for c in going if c.kind in STITCHED} == {c.key for c in expected}
    assert [c.key for c in going] == [c.key for c in everything if c.key in {one.key for one in going}]


def test_a_stream_that_ends_before_it_said_is_ranked_by_what_came() -> None:
    everything = [r.candidate for r in at_once().ranked if r.candidate.kind != "side by side"]
    going, given = outcomes_in_rounds(
        everything,
        pool().all_parts,
        IMAGES[16:80].split(32),
        320,
        lambda candidates, given: [],
        journal=Answers(),
        remembered=Remembered(),
        rejected=Counter(),
        on_batch=lambda count: None,
    )
    assert {len(outcome.vectors[0]) for outcome in given} == {64}
    sources = {c.key for c in everything if c.kind == "source"}
    assert sources <= {c.key for c in going}
    assert len(given) == len(going)
