from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from doubles.pools import path
from doubles.small_sources import plain
from doubles.tensors import digits, noise

from lightning_stitch.composing.pool import Pool
from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing.trials import held_out_images
from lightning_stitch.maths.regression import r2
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.images import held_out_groups, num_held_out

IMAGES = 0.7 * digits(16, 16)[0] + 0.3 * noise(16, 3, 16, 16)
SETTINGS = CalibrationSettings(rows_per_image=8, until="output")


def pool_of(groups: Sequence[object] | None = None, *, batch: int = 5) -> Pool:
    pool = Pool([plain("a", (4, 5, 6), seed=0), plain("b", (5, 6, 7), seed=1)], (3, 16, 16), settings=SETTINGS)
    pool.calibrate(IMAGES.split(batch), groups=groups)
    return pool


@pytest.mark.parametrize(
    ("groups", "held_out"),
    [
        ("aaaabbbbccccdddd", "d"),
        ("abababcbcdcdacab", "d"),
        ("aaaaaaaaaaabbbbb", "b"),
        ("abbbbbbbbbbbbbbb", "a"),
        ("aaaaaaaaaaaabbcd", "bcd"),
        ("aaaaaaaaaabbbccd", "dcx"),
        ((7, 7, 7, "x", "x", "x", None, None, 7, 7), (None,)),
    ],
)
def test_whole_groups_are_held_out_up_to_a_quarter(groups: Sequence[object], held_out: Sequence[object]) -> None:
    found = held_out_groups(groups)
    assert {group for group, chosen in zip(groups, found, strict=True) if chosen} == set(held_out) & set(groups)
    assert {group for group, chosen in zip(groups, found, strict=True) if not chosen} == set(groups) - set(held_out)


@pytest.mark.parametrize("groups", ["aaaaaaaa", ""])
def test_one_group_cannot_be_divided(groups: str) -> None:
    with pytest.raises(CalibrationError, match=r"needs images of at least 2 groups; found .*Leave groups= out"):
        held_out_groups(groups)


@pytest.mark.parametrize("count", [15, 17])
def test_a_label_is_needed_for_each_image(count: int) -> None:
    with pytest.raises(CalibrationError, match=f"one label for each calibration image; found {count} for 16"):
        pool_of("ab" * 7 + "c" * (count - 14))


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_the_images_that_judge_are_of_groups_that_no_fit_has_seen(batch: int) -> None:
    groups = "abcabcdabcabcdab"
    pool = pool_of(groups, batch=batch)
    held_out = held_out_groups(groups)
    own = pool.calibration.sources[0].parts
    candidate = pool.stitch([("a", None, "0"), ("b", "0", None)])
    for images, chosen in zip(held_out_images(candidate, pool.calibration.sources), (False, True), strict=True):
        wanted = torch.stack([x for x, out in zip(IMAGES, held_out, strict=True) if out is chosen])
        with torch.no_grad():
            assert torch.allclose(torch.cat(images), own.pieces[0](own.preprocess(wanted)), atol=1e-5)


def test_stitches_are_judged_by_the_same_images() -> None:
    groups = "abcabcdabcabcdab"
    order = [i for out in (False, True) for i, chosen in enumerate(held_out_groups(groups)) if chosen is out]
    held_out = sum(held_out_groups(groups))
    pool = pool_of(groups)
    stitch = pool.stitch([("a", None, "0"), ("b", "0", None)]).recipe.stitches[0]
    x, y = (source.statistics[0].rows.double() for source in pool.calibration.sources)
    assert len(x) == 8 * 16
    split = 8 * (16 - held_out)
    assert stitch is not None
    assert split == 8 * 14
    mean_x, mean_y = x[:split].mean(0), y[:split].mean(0)
    gram = (x[:split] - mean_x).T @ (x[:split] - mean_x)
    gram.diagonal().add_(1e-3 * gram.trace() / len(gram))
    weight = torch.linalg.solve(gram, (x[:split] - mean_x).T @ (y[:split] - mean_y))
    assert stitch.r2 == pytest.approx(r2((x[split:] - mean_x) @ weight + mean_y, y[split:]), abs=1e-6)
    # The same images in that order from the first give the same without groups, but for who judges.
    other = Pool([s.parts.source for s in pool.calibration.sources], (3, 16, 16), settings=SETTINGS)
    other.calibrate([IMAGES[order]])
    assert torch.allclose(other.calibration.sources[0].features, pool.calibration.sources[0].features, atol=1e-5)
    assert [s.num_held_out for s in other.calibration.sources] == [num_held_out(16)] * 2 == [4, 4]
    assert [s.num_held_out for s in pool.calibration.sources] == [2, 2]


def test_a_search_takes_groups_too() -> None:
    pool = Pool([plain("a", (4, 5, 6), seed=0), plain("b", (5, 6, 7), seed=1)], (3, 16, 16), settings=SETTINGS)
    grouped = pool.search([IMAGES], [IMAGES.flip(3)], groups="aaaaaaaaaaaaaabb", heal=True)
    alone = pool.search([IMAGES], [IMAGES.flip(3)], heal=True)
    scores = {tuple(path(r.candidate)): r.candidate.recipe.stitches for r in alone.ranked}
    assert any(
        r.candidate.recipe.stitches != scores.get(tuple(path(r.candidate)), r.candidate.recipe.stitches)
        for r in grouped.ranked
    )
