from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from doubles.small_sources import live, shake
from doubles.tensors import noise, seeded
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.heads.ridge import RidgeHead
from lightning_stitch.networks.network import StitchedNetwork, assemble
from lightning_stitch.recipe import FragmentRef, Placement, Preprocessing, Recipe
from lightning_stitch.sources.source import Source, load_source
from lightning_stitch.stitching.folding import fold_into_consumer, fold_into_producer
from lightning_stitch.stitching.stitches import Stitch, stitch_spec
from lightning_stitch.training.module import StitchedClassifier

IMAGES = noise(4, 3, 16, 16)
PREPROCESSING = Preprocessing((3, 16, 16), (0.4,) * 3, (0.3,) * 3)


class Block(nn.Sequential):
    """Begins and ends in layers that take a stitch in."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(6, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))


class Blocks(nn.Module):
    """Cuts "stem", "one", "two", "three"; the last two blocks have a weight in common."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.three = nn.Conv2d(3, 6, 3, padding=1), Block(), Block(), Block()
        self.head = nn.Linear(6, 5)
        shake(self, 0)
        self.three[0].weight = self.two[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))


def make_blocks() -> nn.Module:
    return Blocks()


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source(f"python:{__name__}:make_blocks", preprocessing=PREPROCESSING)


def recipe_of(
    source: Source,
    *fragments: tuple[str | None, str | None],
    share: bool | None = None,
    size: int = 16,
    placements: Sequence[Placement] = (),
) -> Recipe:
    """Fragments of one source: stitched where they do not go on from one another; None: sharing is as by default."""
    graph, stitches, chosen = source.graph.at((3, size, size)), [], iter(placements)
    for (_, end), (start, _) in pairwise(fragments):
        assert start is not None
        assert end is not None
        spec = stitch_spec(graph.find(end), graph.find(start), bias=True)
        stitches.append(None if start == end else replace(spec, placement=next(chosen, "explicit")))
    refs = tuple(FragmentRef(source.name, *pair) for pair in fragments)
    width = graph.output_features() if refs[-1].end is None else graph.find(refs[-1].end).channels
    recipe = Recipe.chain((source.ref,), refs, stitches, num_features=width, input_size=(3, size, size))
    return recipe if share is None else replace(recipe, share_weights=share)


def built(source: Source, recipe: Recipe, numbers: Callable[[Stitch], None]) -> StitchedNetwork:
    """The recipe on the source's weights, with numbers of the test's in its stitches."""
    stitches = []
    for fragment in recipe.fragments:
        stitch = None if fragment.stitch is None else Stitch(replace(fragment.stitch, placement="explicit"))
        if stitch is not None:
            numbers(stitch)
        stitches.append(stitch)
    return assemble(recipe, {source.name: source.graph.at(recipe.input_size)}, stitches)


def pass_on(stitch: Stitch) -> None:
    assert stitch.weight is not None
    stitch.weight.data.copy_(torch.eye(stitch.spec.out_channels))


def mix(stitch: Stitch) -> None:
    for tensor in stitch.state_dict().values():
        tensor.normal_(0, 0.5, generator=seeded(1))


def twice(source: Source, *, share: bool, placements: Sequence[Placement] = ()) -> Recipe:
    return recipe_of(
        source, (None, "one"), ("one", "two"), ("one", "two"), ("two", None), share=share, placements=placements
    )


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(module)}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- copied ----------------------------------------------------------------------------------------------------------

PATHS = {
    "twice": ((None, "one"), ("one", "two"), ("one", "two"), ("two", None)),
    "overlapping": ((None, "two"), ("stem", "three"), ("one", None)),
    "tied weights": ((None, "one"), ("one", "two"), ("two", "three"), ("three", None)),
}


@pytest.mark.parametrize("path", PATHS)
def test_by_default_fragments_share_no_storage_with_each_other_or_with_the_source(source: Source, path: str) -> None:
    recipe = recipe_of(source, *PATHS[path])
    network = built(source, recipe, pass_on)
    modules = [source.module, *network.fragments, network.entries[1:]]
    for one, other in combinations(modules, 2):
        assert storages(one).isdisjoint(storages(other))
    # Every fragment has what it needs: nothing is missing, and nothing that the source ties is there once only.
    assert num_parameters(network) == sum(num_parameters(part) for part in modules[1:])


@pytest.mark.parametrize("name", ["test_vit_relpos", "test_resnet", "test_efficientnet_ln"])
@pytest.mark.parametrize("share", [True, False])
def test_a_chain_of_all_fragments_is_the_source_shared_or_not(name: str, share: bool) -> None:
    source = load_source(name, pretrained=False)
    size = source.preprocessing.input_size[-1]
    names = [None, *(cut.name for cut in source.cuts("blocks")), None]
    recipe = recipe_of(source, *pairwise(names), share=share, size=size)
    network, images = built(source, recipe, pass_on), noise(2, 3, size, size)
    assert storages(source.module).isdisjoint(storages(network))
    with torch.no_grad():
        assert torch.equal(network(images), source.module(network.entries[0](images)))
    if share:
        assert num_parameters(network) == num_parameters(source.module)


# -- shared ----------------------------------------------------------------------------------------------------------


def test_a_fragment_used_twice_is_there_once_where_the_recipe_says_so(source: Source) -> None:
    network = built(source, twice(source, share=True), pass_on)
    first, second = network.fragments[1:3]
    assert [id(tensor) for tensor in tensors(first)] == [id(tensor) for tensor in tensors(second)]
    assert len(tensors(first)) == 8
    assert storages(source.module).isdisjoint(storages(network))
    assert num_parameters(network) == num_parameters(source.module) + num_parameters(network.entries[1:])


def test_overlapping_fragments_and_tied_weights_have_in_common_what_the_source_has_in_common(source: Source) -> None:
    network = built(source, recipe_of(source, *PATHS["overlapping"], share=True), pass_on)
    assert num_parameters(network) == num_parameters(source.module) + num_parameters(network.entries[1:])
    chain = built(source, recipe_of(source, *PATHS["tied weights"], share=True), pass_on)
    tied = [layer.weight for layer in chain.modules() if isinstance(layer, nn.Conv2d) and layer.out_channels == 8]
    assert len(tied) == 3
    assert tied[0] is not tied[1]
    assert tied[1] is tied[2]


def test_two_sources_with_the_same_weights_share_nothing(source: Source) -> None:
    other = load_source(source.ref.spec, name="other", preprocessing=PREPROCESSING)
    graph = source.graph
    spec = stitch_spec(graph.find("two"), graph.find("one"), bias=True)
    refs = (FragmentRef(source.name, None, "two"), FragmentRef("other", "one", None))
    width, size = graph.output_features(), (3, 16, 16)
    recipe = Recipe.chain(
        (source.ref, other.ref), refs, (spec,), num_features=width, input_size=size, share_weights=True
    )
    network = assemble(recipe, {source.name: graph, "other": graph})
    assert storages(network.fragments[0]).isdisjoint(storages(network.fragments[1]))


@pytest.mark.parametrize("share", [True, False])
def test_a_repeated_fragment_computes_and_learns_what_the_layer_called_twice_does(source: Source, share: bool) -> None:
    network, reference = built(source, twice(source, share=share), pass_on), copy.deepcopy(source.module)
    assert isinstance(reference, Blocks)
    x = reference.one(reference.stem(network.entries[0](IMAGES)))
    expected = reference.head(reference.three(reference.two(reference.two(x))).mean((2, 3)))
    found = network(IMAGES)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    uses = [dict(fragment.named_parameters()) for fragment in network.fragments[1:3]]
    for name, parameter in reference.two.named_parameters():
        if name == "0.weight":
            continue  # the source ties it to the block behind, which is beside the question
        gradients = [use[f"two.{name}"].grad for use in uses]
        assert gradients[0] is not None
        assert gradients[1] is not None
        torch.testing.assert_close(gradients[0] if share else gradients[0] + gradients[1], parameter.grad)


def test_shared_weights_stay_shared_in_copies_and_other_precisions(source: Source) -> None:
    network = built(source, twice(source, share=True), pass_on)
    for other in (copy.deepcopy(network), copy.deepcopy(network).double()):
        assert num_parameters(other) == num_parameters(network)
        assert storages(other).isdisjoint(storages(network))


def test_the_cost_counts_shared_parameters_once_and_their_work_every_time(source: Source) -> None:
    shared, own = (built(source, twice(source, share=share), pass_on) for share in (True, False))
    costs = [network_cost(network, (3, 16, 16)) for network in (shared, own)]
    assert costs[0].macs == costs[1].macs
    assert costs[0].params == num_parameters(shared)
    # What the source ties lies in the last two of the four fragments, too.
    tied = shared.fragments[1].get_parameter("two.0.weight").numel()
    assert costs[1].params - costs[0].params == num_parameters(shared.fragments[1]) + tied


def test_describe_tells_how_much_is_shared_and_counts_it_once(source: Source) -> None:
    shared, own = (built(source, twice(source, share=share), pass_on) for share in (True, False))
    lines = [network.describe().splitlines() for network in (shared, own)]
    assert lines[0][:-1] == lines[1][:-1]
    in_common = num_parameters(shared.fragments[1])
    assert lines[0][-1] == (
        f"  {num_parameters(shared) / 1e6:.3f} M parameters ({in_common / 1e6:.3f} M of them shared by several "
        f"fragments) at 16x16; gives 5 features"
    )
    assert lines[1][-1] == f"  {num_parameters(own) / 1e6:.3f} M parameters at 16x16; gives 5 features"


# -- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("placement", ["producer", "consumer"])
def test_a_fold_changes_no_other_fragments_layers(source: Source, placement: Placement, share: bool) -> None:
    explicit = built(source, twice(source, share=share), mix)
    network = built(source, twice(source, share=share, placements=[placement]), mix)
    with torch.no_grad():
        expected = explicit(IMAGES)
        torch.testing.assert_close(network(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert (expected - source.module(network.entries[0](IMAGES))).abs().max() > 0.1
    folded, other = network.fragments[1:3] if placement == "producer" else network.fragments[2:0:-1]
    kept = explicit.fragments[1].state_dict()
    assert other.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    # One layer of the two is its own; with it goes the BatchNorm, where that is folded too.
    own = {
        name for name, value in folded.state_dict().items() if name not in kept or not torch.equal(value, kept[name])
    }
    assert own == ({"two.2.weight", "two.2.bias"} if placement == "producer" else {"two.0.weight", "two.0.bias"})
    common = {id(parameter) for parameter in folded.parameters()} & {id(parameter) for parameter in other.parameters()}
    left = {"producer": 2, "consumer": 3}[placement]  # the other layer's parameters, and the BatchNorm's two
    assert len(common) == (left if share else 0)


def test_three_folds_in_a_row_are_each_a_layer_of_its_own(source: Source) -> None:
    paths = ((None, "one"), ("stem", "one"), ("stem", "one"), ("stem", "one"), ("one", None))
    explicit, network = (
        built(source, recipe_of(source, *paths, share=True, placements=places), mix)
        for places in ((), ("producer", "consumer", "producer"))
    )
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES), explicit(IMAGES), rtol=1e-3, atol=1e-3)
    assert [len(list(stitch.parameters())) for stitch in network.entries[1:]] == [0, 0, 0, 0]


@pytest.mark.parametrize("fold", [fold_into_producer, fold_into_consumer])
def test_a_fold_leaves_the_source_of_a_fragment_that_shares_its_layers_alone(fold: Callable[..., None]) -> None:
    network = shake(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1), nn.ReLU()), 0).eval()
    graph, images = CutGraph(network, (3, 8, 8)), noise(2, 3, 8, 8)
    pair = [graph.fragment(None, "1", share=True), graph.fragment("1", None, share=True)]
    stitch = Stitch(stitch_spec(graph.find("1"), graph.find("1"), bias=True))
    mix(stitch)
    with torch.no_grad():
        expected, stitched = network(images), pair[1](stitch(pair[0](images)))
        fold(pair[fold is fold_into_consumer], stitch)
        torch.testing.assert_close(pair[1](pair[0](images)), stitched, rtol=1e-4, atol=1e-4)
        assert torch.equal(network(images), expected)
    assert not torch.allclose(stitched, expected)


# -- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("placement", ["explicit", "producer", "consumer"])
def test_a_state_dict_goes_into_the_network_that_the_recipe_rebuilds(
    source: Source, placement: Placement, share: bool, tmp_path: Path
) -> None:
    network = built(source, twice(source, share=share, placements=[placement]), mix)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    recipe = Recipe.from_dict(json.loads(json.dumps(network.recipe.to_dict())))
    assert recipe == network.recipe
    rebuilt = StitchedNetwork.from_recipe(recipe, trust_factory=True)
    assert num_parameters(rebuilt) == num_parameters(network)
    rebuilt.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), network(IMAGES))


def test_one_copy_of_each_shared_tensor_is_enough_to_load(source: Source) -> None:
    network = built(source, twice(source, share=True), mix)
    owners: dict[int, str] = {}
    for name, tensor in network.state_dict().items():
        owners.setdefault(tensor.data_ptr(), name)
    once = {name: value for name, value in network.state_dict().items() if owners[value.data_ptr()] == name}
    with torch.no_grad():
        for value in once.values():
            value += 1
    rebuilt = StitchedNetwork.from_recipe(network.recipe, trust_factory=True)
    missing = rebuilt.load_state_dict(once, strict=False).missing_keys
    assert missing
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), network(IMAGES))


@pytest.mark.parametrize("share", [True, False])
def test_a_checkpoint_brings_the_sharing_back(source: Source, share: bool, tmp_path: Path) -> None:
    network = built(source, twice(source, share=share, placements=["consumer"]), mix)
    model = StitchedClassifier(num_classes=5, trust_factory=True)
    head = RidgeHead(network.num_features, 5)
    nn.init.normal_(head.weight, generator=seeded(0))
    model.install(network, head)
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.recipe == network.recipe
    assert loaded.network is not None
    assert num_parameters(loaded.network) == num_parameters(network)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), model.eval()(IMAGES))


def test_a_source_of_the_users_own_can_be_shared_too() -> None:
    source = live(Blocks(), "mine")
    network = built(source, twice(source, share=True), pass_on)
    again = live(network, "again").graph
    images = noise(2, 3, 16, 16, seed=5)
    with torch.no_grad():
        x = images
        for start, end in [(None, "fragments.1"), ("fragments.1", None)]:
            x = again.fragment(start, end)(x)
        assert torch.equal(x, network(images))
