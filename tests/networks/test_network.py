from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch
from doubles.outcomes import assembled, run_all
from doubles.pools import references, space_of
from doubles.references import sums_of
from doubles.small_sources import donor, live, plain, shake
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError
from lightning_stitch.networks.network import StitchedNetwork, assemble
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe
from lightning_stitch.search.space import Filters, SearchSpace
from lightning_stitch.search.strategies import Beam, DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources import load_source
from lightning_stitch.stitching.candidates import Candidate

IMAGES = digits(8, 64)[0]


def network_of(space: SearchSpace, candidate: Candidate) -> StitchedNetwork:
    return assembled(candidate, [source.parts for source in space.sources])


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_of([donor("test_resnet", 0), donor("test_efficientnet", 1)], IMAGES)


@pytest.fixture(scope="module")
def candidates(space: SearchSpace) -> list[Candidate]:
    strategy = DepthFirst(span=2, threshold=-1, edge_threshold=-1, max_fragments=4, max_networks=4)
    return [*references(space), *Beam(width=1, fractions=(0.5,))(space), *strategy(space)]


def test_a_recipe_and_a_state_dict_rebuild_the_network_bit_for_bit(
    space: SearchSpace, candidates: list[Candidate]
) -> None:
    placements = {stitch.placement for c in candidates for stitch in c.recipe.stitches if stitch}
    assert placements >= {"explicit", "consumer"}
    for candidate in candidates:
        network = network_of(space, candidate)
        plain_recipe = json.loads(json.dumps(candidate.recipe.to_dict()))
        assert plain_recipe == candidate.recipe.to_dict()
        rebuilt = StitchedNetwork.from_recipe(Recipe.from_dict(plain_recipe))
        assert rebuilt.recipe == candidate.recipe
        images = noise(3, 3, 64, 64)
        with torch.no_grad():
            expected = network(images)
            assert not torch.equal(rebuilt(images), expected)
            rebuilt.load_state_dict(network.state_dict(), strict=True)
            assert torch.equal(rebuilt(images), expected)
        assert sums_of(rebuilt, (3, 64, 64)) == candidate.cost


def test_structure_alone_is_the_same_twice_and_leaves_the_random_state_alone(candidates: list[Candidate]) -> None:
    before = torch.get_rng_state()
    one, other = (StitchedNetwork.from_recipe(candidates[-1].recipe).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_networks_are_copies_that_share_nothing_with_their_sources(
    space: SearchSpace, candidates: list[Candidate]
) -> None:
    def storages(module: nn.Module) -> set[int]:
        tensors = [*module.parameters(), *module.buffers()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    owned = set().union(*(storages(source.parts.source.module) for source in space.sources))
    for candidate in candidates:
        network = network_of(space, candidate)
        assert not owned & storages(network)
        assert not any(parameter.is_inference() for parameter in network.parameters())


def test_a_network_can_be_trained(space: SearchSpace, candidates: list[Candidate]) -> None:
    network = network_of(space, candidates[-1]).train()
    network(IMAGES).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_any_size_give_the_same_features(
    space: SearchSpace, candidates: list[Candidate], batch: int
) -> None:
    images = noise(10, 3, 64, 64)
    for candidate in candidates[2:6]:
        network = network_of(space, candidate)
        with torch.no_grad():
            parts = torch.cat([network(part) for part in images.split(batch)])
            torch.testing.assert_close(parts, network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (80, 112)])
def test_images_of_other_sizes_are_taken(
    space: SearchSpace, candidates: list[Candidate], size: tuple[int, int]
) -> None:
    for candidate in candidates[2:]:
        with torch.no_grad():
            features = network_of(space, candidate)(noise(2, 3, *size))
        assert features.shape[0] == 2
        assert torch.isfinite(features).all()


def test_num_features_is_the_width_of_the_output_and_changes_no_mode(
    space: SearchSpace, candidates: list[Candidate]
) -> None:
    for candidate in candidates:
        network = network_of(space, candidate)
        with torch.no_grad():
            width = network(IMAGES[:1]).shape[1]
        network.train().fragments[0].eval()
        before = {name: module.training for name, module in network.named_modules()}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        assert network.num_features == width
        assert {name: module.training for name, module in network.named_modules()} == before
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_train_and_eval_reach_the_fragments(space: SearchSpace, candidates: list[Candidate]) -> None:
    network = network_of(space, candidates[2])
    assert not any(module.training for module in network.modules())
    with torch.no_grad():
        settled = network(IMAGES)
        moving = network.train()(IMAGES)
    assert all(module.training for module in network.modules())
    assert not torch.allclose(settled, moving, rtol=1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(network.eval()(IMAGES), settled, strict=True))


def test_a_network_that_begins_with_a_source_of_fixed_size_takes_any_image() -> None:
    fixed = live(plain("fixed", (5, 6, 8), seed=0).module, "fixed", size=16, fixed_size=True)
    space = space_of([fixed, plain("b", (4, 7, 9), seed=1)], noise(8, 3, 24, 24))
    found = [c for c in Beam(threshold=-9)(space) if c.recipe.fragments[0].source == "fixed"]
    assert {fragment.source for c in found for fragment in c.recipe.fragments} == {"fixed", "b"}
    for candidate in found:
        network = network_of(space, candidate)
        assert sums_of(network, (3, 24, 24)) == candidate.cost
        big = noise(2, 3, 48, 48)
        small = nn.functional.interpolate(big, size=(16, 16), mode="bilinear", align_corners=False, antialias=True)
        with torch.no_grad():
            torch.testing.assert_close(network(big), network(small), rtol=1e-4, atol=1e-5)


def test_describe_says_what_the_network_is_made_of() -> None:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
    settings = CalibrationSettings(until="output", rows_per_image=256)
    space = space_of(sources, noise(12, 3, 16, 16), settings=settings)
    state = space.starts()[0]
    for cut, receiver in ((0, (1, 1)), (2, (0, 2))):
        x = dict(space.walk(state))[cut]
        edges = space.edges(state, cut, x, Filters(min_cka=-9, min_product=-9))
        state = space.enter(next(e for e in edges if (e.source, e.receiver) == receiver), x)
    candidate = space.complete(state)
    one, two = candidate.recipe.stitches
    assert one is not None
    assert two is not None
    described = network_of(space, candidate).describe()
    cost = f"{candidate.cost} at 16x16; gives 4 features".partition(", ")[2]
    assert described.splitlines() == [
        "Stitched network of 3 fragments",
        "  a: image .. 0, 0.000 M parameters",
        f"    stitch 5x16x16 -> 7x4x4 (NCHW -> NCHW), a layer of its own; CKA {one.cka:.3f}, held-out R2 {one.r2:.3f}",
        "  b: 1 .. 2, 0.001 M parameters",
        f"    stitch 9x1 -> 8x1 (vector -> vector), folded into the layer behind; CKA {two.cka:.3f}, "
        f"held-out R2 {two.r2:.3f}",
        "  a: 2 .. output, 0.000 M parameters",
        "    read at output: 4 features",
        f"  {candidate.cost.params / 1e6:.3f} M parameters, {cost}",
        f"  cka_product {candidate.cka_product:.4g}",
    ]


def test_describe_of_an_unmodified_source_is_one_fragment(space: SearchSpace) -> None:
    source = references(space)[0]
    lines = network_of(space, source).describe().splitlines()
    assert lines[0] == "Stitched network of 1 fragment"
    assert lines[1].startswith("  test_resnet: image .. global_pool, ")
    assert re.search(r"M parameters, [0-9.]+ M MACs at 64x64; gives 96 features$", lines[3])
    recipe = dataclasses.replace(source.recipe, scores={**source.recipe.scores, "activation_bytes": 1_250_000})
    lines = network_of(space, dataclasses.replace(source, recipe=recipe)).describe().splitlines()
    assert re.search(r"M MACs, 1\.25 MB of activations at 64x64; gives 96 features$", lines[3])


@pytest.mark.parametrize(("position", "placement"), [(0, "producer"), (1, "consumer")])
def test_folded_stitches_leave_no_layer_behind(position: int, placement: str) -> None:
    layers = [nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    source = live(shake(nn.Sequential(*layers, *head), 0), "net")
    settings = CalibrationSettings(granularity=("1", "2"), rows_per_image=256, readout="last")
    space = space_of([source], noise(12, 3, 16, 16), settings=settings, ridge=0.0)
    stitched = references(space)[1]
    spec = stitched.recipe.stitches[position]
    assert spec is not None
    assert spec.placement == placement
    network = network_of(space, stitched)
    assert list(network.entries[position + 1].parameters()) == []
    with torch.no_grad():
        images = noise(6, 3, 16, 16, seed=3)
        expected = run_all([stitched], [space.sources[0].parts], [images])[0].features
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(images), source.module[:7]((images - 0.4) / 0.3), rtol=1e-3, atol=1e-4)


def test_a_fragment_that_goes_on_in_its_own_source_needs_no_stitch() -> None:
    source = plain("a", (5, 6, 8), seed=0)
    end = source.graph.find("2")
    halves = [FragmentRef("a", None, "1"), FragmentRef("a", "1", end.name)]
    recipe = Recipe.chain((source.ref,), halves, [None], num_features=8, input_size=(3, 16, 16))
    network = assemble(recipe, {"a": source.graph})
    images = noise(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(images), source.graph.fragment(None, "2")(network.entries[0](images)))
    assert "stitch" not in network.describe().splitlines()[2]


def test_recipes_that_cannot_be_rebuilt_say_why(candidates: list[Candidate]) -> None:
    recipe = candidates[-1].recipe
    own = references(space_of([plain("mine", (5, 6, 8), seed=0)], noise(6, 3, 16, 16)))[0].recipe
    with pytest.raises(RecipeError, match=r"source 'mine' cannot be rebuilt: it was given as a live module"):
        StitchedNetwork.from_recipe(own)
    lost = replace(recipe, fragments=(replace(recipe.fragments[0], end="layer77"), *recipe.fragments[1:]))
    with pytest.raises(RecipeError, match=r"does not fit its sources: No cut is named 'layer77'"):
        StitchedNetwork.from_recipe(lost)
    stitches = [f.stitch and replace(f.stitch, placement="producer") for f in recipe.fragments]
    with pytest.raises(RecipeError, match=r"does not fit its sources: This stitch cannot be folded"):
        StitchedNetwork.from_recipe(recipe.with_stitches(stitches))


def test_a_stitched_network_can_be_a_source_again(space: SearchSpace, candidates: list[Candidate]) -> None:
    class Classifier(nn.Module):
        def __init__(self, network: StitchedNetwork) -> None:
            super().__init__()
            self.network = network
            self.head = nn.Linear(network.num_features, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.network(images))  # type: ignore[no-any-return]

    network = network_of(space, candidates[-1])
    unchanged = Preprocessing((3, 64, 64), (0.0,) * 3, (1.0,) * 3)  # the network normalises by itself
    source = load_source(Classifier(network).eval(), name="stitched", preprocessing=unchanged)
    again = space_of([source], IMAGES)
    assert any(cut.name.startswith("network.entries.") for cut in source.cuts("all"))
    with torch.no_grad():
        features = again.sources[0].features
        torch.testing.assert_close(features, network(IMAGES), rtol=1e-4, atol=1e-5)
