from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from doubles.outcomes import assembled, run_all
from doubles.pools import references, space_of
from doubles.small_sources import live, shake
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting.copies import with_tensors
from lightning_stitch.healing.healer import Healer
from lightning_stitch.healing.trials import run_layerwise
from lightning_stitch.recipe import FragmentRef, Recipe
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

IMAGES = 0.7 * digits(16, 8)[0] + 0.3 * noise(16, 3, 8, 8)
SETTINGS = CalibrationSettings(rows_per_image=256, until="output")


def normed(name: str, seed: int) -> Source:
    """Three blocks of convolution, BatchNorm and ReLU; its cuts are "0", "1" and the vector "2"."""
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, s, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, s in ((3, 6, 1), (6, 8, 2), (8, 10, 1))
    ]
    pooled = nn.Sequential(*blocks[2], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return live(shake(nn.Sequential(blocks[0], blocks[1], pooled, nn.Linear(10, 4)), seed), name, size=8)


@cache
def space() -> SearchSpace:
    return space_of([normed("a", 0), normed("b", 1)], IMAGES, settings=SETTINGS)


def stitched(*fragments: tuple[str, str | None, str | None]) -> Candidate:
    return follow(space(), [FragmentRef(*fragment) for fragment in fragments])


def amplified(candidate: Candidate, factor: float) -> Candidate:
    """The candidate with what its last stitch gives multiplied."""
    step = candidate.steps[-1]
    assert step.stitch is not None
    spec = dataclasses.replace(step.stitch.spec, placement="explicit")
    stitch = type(step.stitch)(spec)
    stitch.load_state_dict({name: factor * x for name, x in step.stitch.state_dict().items()})
    steps = (*candidate.steps[:-1], dataclasses.replace(step, stitch=stitch))
    return dataclasses.replace(candidate, ways=(tuple(steps),))


def healer() -> Healer:
    return Healer(space().sources, settings=SETTINGS, ridge=1e-3)


def outputs(candidate: Candidate, where: SearchSpace) -> Tensor:
    return run_all([candidate], [source.parts for source in where.sources], [IMAGES])[0].features


# -- changing some tensors -------------------------------------------------------------------------------------------


def test_a_variant_has_its_own_numbers_and_shares_the_rest() -> None:
    piece = space().sources[0].parts.pieces[1]
    name = next(name for name, _ in piece.named_buffers() if name.endswith("running_mean"))
    before = piece.get_buffer(name).clone()
    variant = with_tensors(piece, {name: before + 1, "elsewhere.weight": torch.ones(1)})
    assert torch.equal(variant.get_buffer(name), before + 1)
    assert torch.equal(piece.get_buffer(name), before)
    shared = {id(p) for p in piece.parameters()} & {id(p) for p in variant.parameters()}
    assert len(shared) == sum(isinstance(m, nn.Conv2d) for m in piece.modules())
    assert not variant.training


def test_without_a_tensor_of_its_own_the_fragment_itself_is_given() -> None:
    piece = space().sources[0].parts.pieces[1]
    assert with_tensors(piece, {}) is piece
    assert with_tensors(piece, {"elsewhere.weight": torch.ones(1)}) is piece


def test_layer_by_layer_is_the_same_as_in_one_go_and_meets_every_layer_with_its_inputs() -> None:
    piece = space().sources[0].parts.pieces[0]
    met = []
    portions = [IMAGES[:10], IMAGES[10:]]
    with torch.no_grad():
        given = run_layerwise(
            piece, portions, lambda name, inputs: met.append((type(piece.get_submodule(name)), map(len, inputs)))
        )
        assert [torch.equal(x, piece(images)) for x, images in zip(given, portions, strict=True)] == [True, True]
    assert [kind for kind, _ in met] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [list(sizes) for _, sizes in met] == [[10, 6]] * 3


# -- kept only where it helps ----------------------------------------------------------------------------------------


def test_what_has_no_stitch_or_ends_early_stays_as_it_is() -> None:
    source, exit = references(space())[0], space().exit(space().starts()[0], 1)
    assert healer().heal(source) is source
    assert healer().heal(exit) is exit


def test_features_that_do_not_vary_over_the_held_out_images_leave_it_as_it_is() -> None:
    candidate = amplified(stitched(("a", None, "0"), ("b", "0", None)), 5.0)
    sources = [dataclasses.replace(s, features=torch.ones_like(s.features)) for s in space().sources]
    judge = Healer(sources, settings=SETTINGS, ridge=1e-3)
    assert judge.heal(candidate) is candidate
    assert judge.explained(candidate) is None


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_healed_network_is_assembled_with_its_numbers(share_weights: bool) -> None:
    fragments = (("a", None, "0"), ("b", "0", "1"), ("a", "1", None))
    candidate = healer().heal(amplified(stitched(*fragments), 4.0))
    assert candidate.recipe.healed
    recipe = Recipe.from_dict(dataclasses.replace(candidate.recipe, share_weights=share_weights).to_dict())
    network = assembled(candidate, [source.parts for source in space().sources], recipe)
    with torch.no_grad():
        assert torch.allclose(network(IMAGES), outputs(candidate, space()), atol=1e-4)
    assert "healed behind its stitches" in network.describe()


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_healed_network_can_be_trained_on(share_weights: bool) -> None:
    pool = Pool([normed("a", 0), normed("b", 1)], (3, 8, 8), settings=SETTINGS)
    pool.calibrate([IMAGES])
    fragments = [("a", None, "0"), ("b", "0", "1"), ("a", "1", None)]
    candidate = Healer(pool.calibration.sources, settings=SETTINGS, ridge=1e-3).heal(
        amplified(pool.stitch(fragments), 4.0)
    )
    assert candidate.recipe.healed
    network = pool.assemble(candidate, share_weights=share_weights).train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    network(IMAGES).square().mean().backward()
    optimizer.step()
    moved = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert {name for name, _ in network.named_parameters()} <= moved
    assert any(name.endswith("running_mean") for name in moved)
