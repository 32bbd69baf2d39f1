"""Sources side by side with one joint head, and on smaller images."""

from __future__ import annotations

import pytest
import torch
from doubles.small_sources import donor, live
from doubles.two_colours import OneColour, two_colours

from lightning_stitch import Budget, CalibrationSettings, Pool, SearchResult, StitchError, fit_ridge_head

IMAGES, LABELS = two_colours(300)
SELECTION = [(IMAGES[16:156], LABELS[16:156])]


def search(pool: Pool, **options: object) -> SearchResult:
    return pool.search([IMAGES[:16]], SELECTION, max_candidates=2, **options)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool([live(OneColour(0).eval(), "red"), live(OneColour(1).eval(), "green")], (3, 16, 16))


def test_a_label_that_only_two_sources_together_tell_is_told_by_both_side_by_side(pool: Pool) -> None:
    result = search(pool)
    best = result.best.candidate
    assert best.kind == "side by side"
    assert {fragment.source for fragment in best.recipe.fragments} == {"red", "green"}
    assert result.best.scores["loo_accuracy"] > 0.9 > 0.85 > result.best_source.scores["loo_accuracy"]
    network = pool.assemble(best)
    with torch.no_grad():
        features = network(IMAGES)
    blocks = best.recipe.head_blocks
    head, _ = fit_ridge_head(features[16:156], LABELS[16:156], num_classes=2, blocks=blocks)
    assert (head(features[156:]).argmax(1) == LABELS[156:]).float().mean() > 0.9
    costs = [part.cost.macs for part in pool.parts]
    assert max(costs) < best.cost.macs <= sum(costs)


def test_what_stands_side_by_side_keeps_the_budget_and_the_number_that_are_allowed(pool: Pool) -> None:
    both = [r for r in search(pool).ranked if r.candidate.kind == "side by side"]
    assert both
    assert not [r for r in search(pool, max_roots=1).ranked if r.candidate.kind == "side by side"]
    least = min(r.candidate.cost.macs for r in both)
    within = search(pool, budget=Budget(max_macs=least - 1), sizes=[])
    assert all(r.candidate.cost.macs < least for r in within.ranked if r.candidate.kind == "side by side")
    with pytest.raises(StitchError, match="max_roots must be at least 1; found 0"):
        search(pool, max_roots=0)


def test_an_addition_that_tells_nothing_new_is_none() -> None:
    pool = Pool([live(OneColour(0).eval(), "red"), live(OneColour(0).eval(), "again")], (3, 16, 16))
    result = search(pool)
    assert result.best.candidate.kind != "side by side"
    assert result.best.score >= result.best_source.score


def test_smaller_images_are_candidates_where_they_are_asked_for_or_a_budget_asks_for_less() -> None:
    pool = Pool([donor("test_resnet"), donor("test_vit")], (3, 96, 96), settings=CalibrationSettings("stages"))
    images = torch.nn.functional.interpolate(IMAGES[:60], size=96)
    selection = [(images[16:], LABELS[16:60])]

    def sizes_of(result: SearchResult) -> set[tuple[str, tuple[int, int] | None]]:
        return {
            (r.candidate.recipe.fragments[0].source, r.candidate.recipe.fragments[0].image_size)
            for r in result.ranked
            if r.candidate.kind == "smaller image"
        }

    plain = pool.search([images[:16]], selection, max_candidates=1, max_roots=1)
    assert not sizes_of(plain)
    asked = pool.search([images[:16]], selection, max_candidates=1, max_roots=1, sizes=[64, 128])
    assert sizes_of(asked) == {("test_resnet", (64, 64))}  # the transformer takes one size alone
    half = min(part.cost.macs for part in pool.parts) / 2
    limited = pool.search([images[:16]], selection, max_candidates=1, max_roots=1, budget=Budget(max_macs=half))
    assert ("test_resnet", (64, 64)) in sizes_of(limited)
    assert limited.best.candidate.cost.macs <= half
    ranked = next(r for r in asked.ranked if r.candidate.kind == "smaller image")
    network = pool.assemble(ranked.candidate)
    with torch.no_grad():
        small = torch.nn.functional.interpolate(images[:2], size=64, mode="bilinear", antialias=True)
        torch.testing.assert_close(network(images[:2]), network(small), atol=1e-2, rtol=1e-2)
    assert ranked.candidate.cost.macs < pool.parts[0].cost.macs / 2
    with pytest.raises(StitchError, match="heights of images in pixels"):
        pool.search([images[:16]], selection, sizes=[0])


def test_of_two_sizes_that_cannot_be_told_apart_the_larger_is_taken() -> None:
    """Even images look the same at every size."""
    colours = IMAGES.mean((2, 3), keepdim=True)
    images = colours.expand(-1, -1, 96, 96)[:120].contiguous()
    pool = Pool([live(OneColour(0).eval(), "red", size=96)], (3, 96, 96))
    noise = 0.3 * torch.randn(120, generator=torch.Generator().manual_seed(1))
    labels = (colours[:120, 0].flatten() + noise > 0.5).long()
    result = pool.search([images[:16]], [(images[16:], labels[16:])], max_candidates=1, max_roots=1, sizes=[64])
    assert any(r.candidate.kind == "smaller image" for r in result.ranked)
    assert result.best.candidate.kind != "smaller image"
