from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from doubles.outcomes import assembled, run_all
from doubles.pools import path, space_of
from doubles.references import sums_of
from doubles.small_sources import donor, live, plain, shake
from doubles.tensors import digits, noise
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.cutting.probing import network_activation_bytes
from lightning_stitch.errors import BudgetError
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import Recipe
from lightning_stitch.search.paths import early_exits
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

SIZE = 32
CALIBRATION = 0.7 * digits(12, SIZE)[0] + 0.3 * noise(12, 3, SIZE, SIZE)
IMAGES = noise(3, 3, SIZE, SIZE, seed=1)


def vit(*, prefix: bool) -> Source:
    torch.manual_seed(0)
    options = {} if prefix else {"class_token": False, "global_pool": "avg"}
    network = VisionTransformer(SIZE, 8, embed_dim=24, depth=3, num_heads=2, num_classes=5, **options)  # type: ignore[arg-type]
    return live(network, "vit", size=SIZE, fixed_size=True)


def swin() -> Source:
    torch.manual_seed(1)
    network = SwinTransformer(
        img_size=SIZE, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    return live(network, "swin", size=SIZE, fixed_size=True)


def hidden_layer() -> Source:
    front = [nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return live(shake(nn.Sequential(*front, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), 0), "hidden", size=SIZE)


def wide_at_one_position() -> Source:
    """Nothing needs more memory than the average of its last cut but one."""
    front = [nn.Conv2d(3, 2, SIZE), nn.Conv2d(2, 8192, 1), nn.ReLU(inplace=True), nn.Conv2d(8192, 3, 1)]
    return live(shake(nn.Sequential(*front, nn.Flatten(), nn.Linear(3, 4)), 0), "wide", size=SIZE)


# The network, one of its modules at whose end it can be cut, and how a map, tokens or a vector there is averaged.
KINDS: dict[str, tuple[Callable[[], Source], str, Callable[[Tensor], Tensor]]] = {
    "NCHW": (lambda: donor("test_resnet"), "layer2", lambda x: x.mean((2, 3))),
    "NHWC": (swin, "layers.0.blocks.0", lambda x: x.mean((1, 2))),
    "tokens with a prefix": (lambda: vit(prefix=True), "blocks.1", lambda x: x[:, 1:].mean(1)),
    "tokens alone": (lambda: vit(prefix=False), "blocks.1", lambda x: x.mean(1)),
    "vector": (hidden_layer, "3", lambda x: x),
    "wide": (wide_at_one_position, "2", lambda x: x[:, :, 0, 0]),
}


@cache
def space(kind: str) -> SearchSpace:
    settings = CalibrationSettings(granularity="all", rows_per_image=16, readout="last")
    return space_of([KINDS[kind][0]()], CALIBRATION, settings=settings)


def network_of(space: SearchSpace, candidate: Candidate) -> StitchedNetwork:
    return assembled(candidate, [source.parts for source in space.sources])


@pytest.mark.parametrize("kind", KINDS)
def test_an_early_exit_gives_what_the_networks_own_module_gives_averaged_by_hand(kind: str) -> None:
    _, name, average = KINDS[kind]
    source = space(kind).sources[0].parts
    (candidate,) = (c for c in early_exits(space(kind)) if c.recipe.fragments[0].end == name)
    seen: list[Tensor] = []
    hook = source.source.module.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[-1].clone()))
    with torch.no_grad():
        source.source.module.eval()(source.preprocess(IMAGES))
        hook.remove()
        found = network_of(space(kind), candidate)(IMAGES)
    assert seen[0].ndim == {"N": 4, "t": 3, "v": 2, "w": 4}[kind[0]]
    torch.testing.assert_close(found, average(seen[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_runs_costs_and_is_recorded_as_the_assembled_network(kind: str) -> None:
    found, parts = early_exits(space(kind)), space(kind).sources[0].parts
    assert [path(c) for c in found] == [[(parts.name, None, cut.name)] for cut in parts.cuts]
    assert all(c.kind == "early exit" and c.cka_product == 1 for c in found)
    grids = [cut.grid for cut in parts.cuts]
    assert [tap.statistics for c in found for tap in c.recipe.taps] == [("mean",) if grid else () for grid in grids]
    outcomes = run_all(found, [parts], IMAGES.split(2))
    for candidate, outcome, cut in zip(found, outcomes, parts.cuts, strict=True):
        network = network_of(space(kind), candidate)
        cost = candidate.cost
        assert sums_of(network, (3, SIZE, SIZE)) == cost
        assert candidate.recipe.scores.items() >= {"params": cost.params, "macs": cost.macs}.items()
        with torch.no_grad():
            features = network(IMAGES)
        assert features.shape == (3, cut.channels)
        assert network.num_features == cut.channels
        torch.testing.assert_close(outcome.features, features, rtol=1e-4, atol=1e-5)
        assert candidate.cost.macs < parts.cost.macs


def test_the_average_can_be_what_needs_the_most_memory() -> None:
    networks = [network_of(space("wide"), candidate) for candidate in early_exits(space("wide"))]
    assert max(network_activation_bytes(network, (3, SIZE, SIZE)) for network in networks) == 2 * 4 * 8192


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_recipe_and_a_state_dict_rebuild_an_early_exit_bit_for_bit(architecture: str) -> None:
    source = donor(architecture)
    size = source.preprocessing.input_size[1]
    space = space_of([source], noise(6, 3, size, size))
    for candidate in early_exits(space)[1::3]:
        network = network_of(space, candidate)
        recipe = Recipe.from_dict(json.loads(json.dumps(candidate.recipe.to_dict())))
        assert recipe == candidate.recipe
        rebuilt = StitchedNetwork.from_recipe(recipe)
        images = noise(2, 3, size, size, seed=2)
        with torch.no_grad():
            assert not torch.equal(rebuilt(images), network(images))
            rebuilt.load_state_dict(network.state_dict(), strict=True)
            assert torch.equal(rebuilt(images), network(images))


def test_a_stitched_network_can_end_early_too() -> None:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
    settings = CalibrationSettings(rows_per_image=256, readout="last")
    space = space_of(sources, noise(12, 3, 16, 16), settings=settings)
    state = space.starts()[0]
    activation = dict(space.walk(state))[0]
    edge = space.edge(state, 0, activation, 1, 0)
    assert edge is not None
    candidate = space.exit(space.enter(edge, activation), 1)
    assert path(candidate) == [("a", None, "0"), ("b", "0", "1")]
    assert candidate.cka_product == edge.cka
    network = network_of(space, candidate)
    assert sums_of(network, (3, 16, 16)) == candidate.cost
    (outcome,) = run_all([candidate], [source.parts for source in space.sources], [noise(3, 3, 16, 16)])
    with torch.no_grad():
        torch.testing.assert_close(network(noise(3, 3, 16, 16)), outcome.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("NCHW", "    read at layer2: 48 features"), ("vector", "    read at 3: 6 features")],
)
def test_describe_says_that_the_network_ends_early_and_where(kind: str, words: str) -> None:
    _, name, _ = KINDS[kind]
    (candidate,) = (c for c in early_exits(space(kind)) if c.recipe.fragments[0].end == name)
    source = candidate.recipe.fragments[0].source
    lines = network_of(space(kind), candidate).describe().splitlines()
    assert lines[0] == "Stitched network of 1 fragment"
    assert lines[1].startswith(f"  {source}: image .. {name}, ")
    assert lines[2] == words
    assert lines[3].endswith(
        f"M parameters, {candidate.cost.macs / 1e6:.1f} M MACs at 32x32; gives {candidate.recipe.num_features} features"
    )
    ends = " (ends early)" if kind == "NCHW" else ""
    assert candidate.recipe.path == f"{source}: image .. {name}{ends}"


# -- in a search -----------------------------------------------------------------------------------------------------


def sources() -> list[Source]:
    return [plain("a", (8, 9, 10), seed=0), plain("b", (4, 7, 12), seed=1, strides=(2, 2, 1))]


def kinds(pool: Pool, **options: object) -> set[str]:
    selection = [digits(40, SIZE, first=20, classes=3)]
    result = pool.search([CALIBRATION], selection, max_candidates=2, **options)  # type: ignore[arg-type]
    return {r.candidate.kind for r in result.ranked}


def test_exits_that_do_not_keep_the_budget_are_left_out_and_counted() -> None:
    free = early_exits(space_of(sources(), CALIBRATION))
    limit = sorted(c.cost.macs for c in free)[1]
    kept = space_of(sources(), CALIBRATION, budget=Budget(max_macs=limit))
    expected = [c.recipe for c in free if c.cost.macs <= limit]
    assert [c.recipe for c in early_exits(kept)] == expected
    assert kept.rejected == {"over the budget": len(free) - len(expected)}
    assert 0 < len(expected) < len(free)


def test_a_cut_that_does_not_vary_is_no_exit() -> None:
    source = plain("a", (8, 9, 10), seed=0)
    dead = source.module[1][0]
    nn.init.zeros_(dead.weight)
    nn.init.ones_(dead.bias)
    space = space_of([source], CALIBRATION)
    assert [path(c) for c in early_exits(space)] == [[("a", None, "0")]]
    assert space.rejected == {"activation at an early exit does not vary": 1}


def test_exits_are_candidates_unless_that_is_switched_off() -> None:
    pool = Pool(sources(), (3, SIZE, SIZE))
    assert kinds(pool, max_roots=1) - {"shortened"} == {"source", "self-stitched", "early exit", "stitched"}
    assert kinds(pool, exits=False, max_roots=1) - {"shortened"} == {"source", "self-stitched", "stitched"}


def test_networks_that_end_at_an_output_have_no_exits() -> None:
    pool = Pool(sources(), (3, SIZE, SIZE), settings=CalibrationSettings(until="output"))
    assert "early exit" not in kinds(pool)
    # Nor do they count as the cheapest there is.
    with pytest.raises(BudgetError, match="cheapest composition has") as refused:
        kinds(pool, budget=Budget(max_macs=1))
    assert "ended at" not in str(refused.value)


def test_the_product_of_ckas_does_not_rank_exits_which_have_no_stitch() -> None:
    pool = Pool(sources(), (3, SIZE, SIZE))
    assert "early exit" not in kinds(pool, ranking="cka_product")


def test_a_network_that_ends_before_any_weights_is_assembled() -> None:
    layers = [nn.AvgPool2d(2), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    settings = CalibrationSettings(readout="last")
    pool = Pool([live(nn.Sequential(*layers), "pooled", size=SIZE)], (3, SIZE, SIZE), settings=settings)
    result = pool.search([CALIBRATION], [noise(8, 3, SIZE, SIZE)])
    bare = next(r.candidate for r in result.ranked if r.candidate.kind == "early exit" and not r.candidate.cost.params)
    network = pool.assemble(bare)
    assert network.num_features == 3
    assert torch.allclose(network(IMAGES), pool.parts[0].preprocess(IMAGES).mean((2, 3)), atol=1e-6)
