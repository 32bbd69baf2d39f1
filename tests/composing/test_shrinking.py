from __future__ import annotations

import doctest

import pytest
import torch
from doubles.small_sources import donor
from doubles.tensors import digits, noise

from lightning_stitch.composing import shrinking
from lightning_stitch.composing.shrinking import Shrunk, shrink
from lightning_stitch.cost import Budget
from lightning_stitch.errors import BudgetError, CalibrationError
from lightning_stitch.maths.regression import r2
from lightning_stitch.search.strategies import Beam

IMAGES = 0.6 * digits(48, 48)[0] + 0.4 * noise(48, 3, 48, 48)
CALIBRATION, SELECTION = [IMAGES[:32]], [IMAGES[32:]]
SOURCE = donor("test_resnet")


def shrunk(budget: Budget | float) -> Shrunk:
    return shrink(SOURCE, CALIBRATION, SELECTION, budget, strategy=Beam(max_fragments=2))


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(shrinking) == (0, 7)


@pytest.mark.parametrize("share", [0.75, 0.5, 1 / 3])
def test_a_short_version_keeps_its_budget_and_gives_what_its_fidelity_says(share: float) -> None:
    found = shrunk(share)
    whole = next(r.candidate.cost.macs for r in found.result.ranked if r.candidate.kind == "source")
    assert found.chosen.candidate.cost.macs <= share * whole
    assert [ref.source for ref in found.chosen.candidate.recipe.fragments] == [SOURCE.name] * 2
    with torch.no_grad():
        given = found.network(IMAGES[32:])
    own = SOURCE.module(shrinking_view(IMAGES[32:]))
    assert found.fidelity == pytest.approx(r2(given, own.detach()), abs=1e-3)
    others = [r.score for r in found.result.ranked if r.candidate.kind in ("stitched", "shortened")]
    assert found.fidelity == max(others)


def shrinking_view(images: torch.Tensor) -> torch.Tensor:
    """Normalised as the source wants them."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (SOURCE.preprocessing.mean, SOURCE.preprocessing.std))
    return (images - mean) / std


def test_with_a_least_fidelity_the_cheapest_version_is_taken_that_is_so_true() -> None:
    least = shrunk(0.9).fidelity - 1e-6
    found = shrunk(Budget(min_score=least))
    assert found.fidelity >= least
    reaching = [r.candidate.cost.macs for r in found.result.ranked if r.score >= least]
    assert found.chosen.candidate.cost.macs == min(reaching)
    assert len(reaching) > 1


def test_healing_makes_short_versions_truer() -> None:
    healed = shrunk(0.75)
    bare = shrink(SOURCE, CALIBRATION, SELECTION, 0.75, strategy=Beam(max_fragments=2), max_healed=0)
    assert healed.chosen.candidate.recipe.healed
    assert not bare.chosen.candidate.recipe.healed
    assert healed.fidelity > bare.fidelity + 0.02


def test_what_cannot_be_done_is_an_error_that_says_why() -> None:
    with pytest.raises(BudgetError, match="budget"):
        shrunk(0.001)
    with pytest.raises(CalibrationError, match="There are no calibration images"):
        shrink(SOURCE, [], SELECTION, 0.5)
