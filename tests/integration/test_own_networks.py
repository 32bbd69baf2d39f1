"""Networks as users write them: whatever is in them, fragments do what the network does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from doubles.own_networks import NETWORKS, SIZE, Own
from doubles.small_sources import live, plain
from doubles.tensors import noise, seeded
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.networks.network import StitchedNetwork, assemble
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe
from lightning_stitch.sources.source import Source, load_source
from lightning_stitch.stitching.stitches import Stitch, is_bridgeable, stitch_spec

GREYISH = Preprocessing(SIZE, (0.4,) * 3, (0.3,) * 3)


def chain(graph: CutGraph) -> list[fx.GraphModule]:
    """Fragments between all cuts."""
    return [graph.fragment(*pair) for pair in pairwise([None, *(cut.name for cut in graph.cuts("all")), None])]


def two_sources(first: Source, cut: str, other: Source, entry: str) -> StitchedNetwork:
    """From the image through one source and on through another, by a stitch of the test's numbers."""
    spec = stitch_spec(first.graph.find(cut), other.graph.find(entry), bias=True)
    stitch = Stitch(spec)
    for tensor in stitch.state_dict().values():
        tensor.normal_(0, 0.5, generator=seeded(2))
    refs = (FragmentRef(first.name, None, cut), FragmentRef(other.name, entry, None))
    width = other.graph.output_features()
    recipe = Recipe.chain((first.ref, other.ref), refs, (spec,), num_features=width, input_size=SIZE)
    return assemble(recipe, {source.name: source.graph for source in (first, other)}, [None, stitch])


# -- what networks hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_fragments_in_a_row_do_what_the_network_does(kind: str) -> None:
    network = NETWORKS[kind]()
    source, images = live(network, "own"), noise(3, *SIZE)
    with torch.no_grad():
        expected = copy.deepcopy(source.module)(images.clone())
        fragments = chain(source.graph)
        assert len(fragments) >= 5
        x = images
        for fragment in fragments:
            before = x.clone()
            result = fragment(x)
            assert torch.equal(x, before)
            x = result
        assert torch.equal(x, expected)
        assert torch.equal(network.eval()(images.clone()), expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_stitched_to_another_network_and_from_it(kind: str) -> None:
    own, other, images = live(NETWORKS[kind](), "own"), plain("other", (5, 6, 7), seed=3), noise(3, *SIZE)
    cut = own.graph.cuts("all")[len(own.graph.cuts("all")) // 2].name
    for first, leaves, second, enters in ((own, cut, other, "0"), (other, "0", own, cut)):
        assert is_bridgeable(first.graph.find(leaves), second.graph.find(enters))
        network = two_sources(first, leaves, second, enters)
        with torch.no_grad():
            x = first.graph.fragment(None, leaves)(network.entries[0](images))
            expected = second.graph.fragment(enters, None)(network.entries[1](x))
            assert torch.equal(network(images), expected)
        network.train()(images).square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["+=", "[] =", "sizes and []="])
def test_fragments_that_write_in_place_can_be_pickled(kind: str) -> None:
    fragment, images = live(NETWORKS[kind](), "own").fragment(None, None), noise(2, *SIZE)
    file = io.BytesIO()
    torch.save(fragment, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(images), fragment(images))


@pytest.mark.parametrize("kind", ["+=", "[] =", "input written", "a layer called twice"])
def test_gradients_through_fragments_are_the_networks(kind: str) -> None:
    network = NETWORKS[kind]().eval()
    images = noise(2, *SIZE)
    fragment = live(network, "own").fragment(None, None)
    for module in (network, fragment):
        module(images.clone()).square().sum().backward()
    found = dict(fragment.named_parameters())
    used = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert used.keys() == found.keys()
    for name, gradient in used.items():
        torch.testing.assert_close(found[name].grad, gradient)


def test_frozen_parameters_stay_frozen_in_fragments_and_stitched_networks() -> None:
    network = Own()
    network.b.requires_grad_(False)
    network.norm.bias.requires_grad_(False)
    frozen = {"b.weight", "b.bias", "norm.bias"}
    own = live(network, "own")
    for module in (
        own.fragment(None, None),
        two_sources(plain("other", (5, 6, 7), seed=3), "0", own, "a").fragments[1],
    ):
        trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        assert {name for name in trainable if not trainable[name]} == frozen
        assert any(trainable.values())


# -- train and eval --------------------------------------------------------------------------------------------------


def test_batch_norm_of_a_fragment_in_train_mode_updates_its_own_statistics_and_never_the_sources() -> None:
    own, images = live(Own(), "own"), noise(6, *SIZE)
    before = {name: buffer.clone() for name, buffer in own.module.named_buffers()}
    reference = copy.deepcopy(own.module).train()
    fragments = nn.Sequential(*chain(own.graph)).train()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fragments(images), reference(images))
        assert torch.equal(fragments.eval()(images), reference.eval()(images))
        assert not torch.equal(fragments(images), own.module(images))
    updated = next(part for part in fragments.modules() if isinstance(part, nn.BatchNorm2d))
    assert torch.equal(updated.running_mean, reference.norm.running_mean)
    assert updated.num_batches_tracked == 3
    assert all(torch.equal(buffer, before[name]) for name, buffer in own.module.named_buffers())


class Attends(nn.Module):
    """A small module that asks for its mode where it matters."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.5 if self.training else 0.0).view(x.shape)


class Residual(nn.Module):
    """Drops the whole branch of some images, by torchvision's means."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.drop = nn.Conv2d(4, 4, 1), StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "RReLU": nn.RReLU,
    "stochastic depth": Residual,
    "attention": Attends,
    "encoder layer": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, dropout=0.5, batch_first=True), nn.Unflatten(2, (8, 8))
    ),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_what_is_random_in_train_mode_is_so_in_fragments_and_settled_in_eval_mode(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), RANDOM[kind](), nn.Conv2d(4, 4, 1), nn.Flatten())
    own, images = live(nn.Sequential(network, nn.Linear(256, 4)), "own"), noise(8, *SIZE)
    fragments = nn.Sequential(*chain(own.graph))
    with torch.no_grad():
        assert torch.equal(fragments.eval()(images), own.module(images))
        assert torch.equal(fragments(images), fragments(images))
        reference = copy.deepcopy(own.module).train()
        torch.manual_seed(1)
        expected = reference(images)
        torch.manual_seed(1)
        assert torch.equal(fragments.train()(images), expected)
        assert not torch.equal(fragments(images), expected)


# -- precision -------------------------------------------------------------------------------------------------------


def make_bfloat16() -> nn.Module:
    return Own().bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_precisions_are_composed_in_float32(dtype: torch.dtype) -> None:
    network = Own().to(dtype)
    own, images = live(network, "own"), noise(3, *SIZE)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert {tensor.dtype for tensor in own.module.parameters()} == {torch.float32}
    assert own.ref.weight_hash != live(Own(), "own").ref.weight_hash
    stitched = two_sources(own, "relu@2", plain("other", (5, 6, 7), seed=3), "0")
    with torch.no_grad():
        expected = network.eval()(images.to(dtype)).float()
        torch.testing.assert_close(nn.Sequential(*chain(own.graph))(images), expected, rtol=0.05, atol=0.05)
        assert stitched(images).dtype == torch.float32


def test_a_factory_of_another_precision_is_rebuilt_as_it_was_loaded() -> None:
    source = load_source(f"python:{__name__}:make_bfloat16", preprocessing=GREYISH)
    whole = FragmentRef(source.name, None, None)
    recipe = Recipe.chain((source.ref,), (whole,), num_features=source.graph.output_features(), input_size=SIZE)
    network, rebuilt = (
        assemble(recipe, {source.name: source.graph}),
        StitchedNetwork.from_recipe(recipe, trust_factory=True),
    )
    rebuilt.load_state_dict(network.state_dict())
    with torch.no_grad():
        for parameter in (*network.parameters(), *rebuilt.parameters()):
            parameter += 1e-4  # lost in bfloat16
        assert torch.equal(rebuilt(noise(2, *SIZE)), network(noise(2, *SIZE)))
        assert {parameter.dtype for parameter in rebuilt.parameters()} == {torch.float32}
