from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from doubles.small_sources import donor, shake
from doubles.tensors import noise
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.errors import CutError
from lightning_stitch.settings import Granularity
from lightning_stitch.sources.source import Source

FIXED_SIZE = ["test_coatnet", "test_maxvit", "test_vit3", "test_vit_relpos"]
ANY_SIZE = [name for name in timm.list_models("test_*") if name not in FIXED_SIZE]
TORCHVISION = [f"torchvision:{name}" for name in ("resnet18", "densenet121", "mobilenet_v3_small")]

shaken = cache(donor)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ends(graph: CutGraph, granularity: Granularity) -> list[tuple[str | None, str | None]]:
    return list(pairwise([None, *(cut.name for cut in graph.cuts(granularity)), None]))


def run_in_a_row(fragments: list[fx.GraphModule], x: Tensor) -> Tensor:
    for fragment in fragments:
        before = x.clone()
        result = fragment(x)
        assert torch.equal(x, before), "a fragment has written into its input"
        x = result
    return x


def assert_recomposes(source: Source, graph: CutGraph, granularity: Granularity, images: Tensor) -> None:
    fragments = [graph.fragment(start, end) for start, end in ends(graph, granularity)]
    assert torch.equal(run_in_a_row(fragments, images), source.module(images))


# -- recomposition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ANY_SIZE, *FIXED_SIZE])
@pytest.mark.parametrize("granularity", ["reference", "all"])
def test_fragments_in_a_row_are_the_source_bit_for_bit(name: str, granularity: Granularity) -> None:
    source = shaken(name)
    assert_recomposes(source, source.graph, granularity, noise(2, *source.preprocessing.input_size))


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("granularity", ["stages", "reference", "all"])
def test_fragments_of_torchvisions_networks_are_their_source_bit_for_bit(name: str, granularity: Granularity) -> None:
    source = shaken(name)
    assert_recomposes(source, source.graph, granularity, noise(1, 3, 224, 224))


@pytest.mark.parametrize("name", [*ANY_SIZE, *TORCHVISION])
@pytest.mark.parametrize("shape", [(1, 3, 96, 96), (2, 3, 64, 96)])
def test_fragments_recompose_images_of_another_size_and_number(name: str, shape: tuple[int, int, int, int]) -> None:
    source = shaken(name)
    assert_recomposes(source, source.graph, "blocks", noise(*shape))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "torchvision:resnet18"]
)
def test_a_graph_at_another_size_recomposes_and_keeps_its_cuts(name: str) -> None:
    source = shaken(name)
    small = source.graph.at((3, 96, 96))
    assert [cut.name for cut in small.cuts("blocks")] == [cut.name for cut in source.cuts("blocks")]
    assert small.at(source.preprocessing.input_size).cuts("all") == source.cuts("all")
    assert_recomposes(source, small, "all", noise(2, 3, 96, 96))


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_size_that_a_source_refuses_is_an_error(name: str) -> None:
    with pytest.raises(CutError, match=r"fails in a dry run: \w+Error: "):
        shaken(name).graph.at((3, 96, 96))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit3", "test_efficientnet"])
def test_one_fragment_across_many_cuts_is_the_fragments_between_them(name: str) -> None:
    source = shaken(name)
    cuts = [cut.name for cut in source.cuts("all")]
    middle, last = len(cuts) // 3, len(cuts) - 2
    x = source.graph.fragment(None, cuts[middle])(noise(2, *source.preprocessing.input_size))
    steps = [source.graph.fragment(a, b) for a, b in pairwise(cuts[middle : last + 1])]
    across = source.graph.fragment(cuts[middle], cuts[last])
    assert torch.equal(across(x), run_in_a_row(steps, x))


class CountsItsBatch(nn.Module):
    """Takes the batch size of the image and uses it, and multiples of it, at the end."""

    def __init__(self, change: Callable[[int], int]) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), change

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        count = self.change(batch)
        x = self.second(self.first(x))
        return x.view(batch, 4, -1).reshape(count, -1).sum() / count + x.mean((2, 3))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_size_may_cross_a_cut(batch: int) -> None:
    network = CountsItsBatch(lambda size: 2 * size).eval()
    graph = CutGraph(network, (3, 8, 8))
    assert [cut.name for cut in graph.cuts("all")] == ["first", "second"]
    images = noise(batch, 3, 8, 8)
    for middle in ("first", "second"):
        pair = [graph.fragment(None, middle), graph.fragment(middle, None)]
        assert torch.equal(run_in_a_row(pair, images), network(images))


def test_a_number_that_is_no_multiple_of_the_batch_size_may_not() -> None:
    class OneMore(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            more = x.shape[0] + 1
            return super().forward(x) * more

    with pytest.raises(CutError, match="no place where exactly one activation tensor is live"):
        CutGraph(OneMore(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), (3, 8, 8))


def test_a_tensor_whose_first_dimension_is_not_the_batch_is_no_cut() -> None:
    class Windows(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            windows = self[1](x.unflatten(1, (2, 2)).flatten(0, 1))
            return self[2](windows.unflatten(0, (-1, 2)).flatten(1, 2))

    network = Windows(nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 1))
    graph, images = CutGraph(network, (3, 8, 8)), noise(3, 3, 8, 8)
    assert [cut.shape for cut in graph.cuts("all")] == [(4, 8, 8), (4, 8, 8)]
    assert torch.equal(run_in_a_row([graph.fragment(*pair) for pair in ends(graph, "all")], images), network(images))


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ANY_SIZE, *FIXED_SIZE, *TORCHVISION])
def test_fragments_share_out_parameters_and_buffers(name: str) -> None:
    source = shaken(name)
    graph, pairs = source.graph, ends(source.graph, "all")
    fragments = [graph.fragment(start, end, share=True) for start, end in pairs]
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        found = [id(tensor) for fragment in fragments for tensor in tensors(fragment)]
        assert len(found) == len(set(found))
        assert set(found) == {id(tensor) for tensor in tensors(source.module)}
    for fragment, pair in zip(fragments, pairs, strict=True):
        assert {id(p) for p in fragment.parameters()} == {id(p) for p in graph.parameters(*pair)}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_convnext", "test_efficientnet_evos"])
def test_cutting_leaves_the_source_as_it_was(name: str) -> None:
    network = copy.deepcopy(donor(name).module).train()
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    first.eval().requires_grad_(False)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    flags = {key: part.training for key, part in network.named_modules()}
    trained = {key: parameter.requires_grad for key, parameter in network.named_parameters()}

    graph = CutGraph(network, (3, 160, 160))
    for start, end in ends(graph, "blocks"):
        fragment = graph.fragment(start, end).train()
        for tensor in (*fragment.parameters(), *fragment.buffers()):
            tensor.zero_()

    assert {key: part.training for key, part in network.named_modules()} == flags
    assert {key: parameter.requires_grad for key, parameter in network.named_parameters()} == trained
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_convnext"])
def test_a_fragment_shares_no_storage_unless_it_is_asked_to(name: str) -> None:
    source = shaken(name)

    def storages(module: nn.Module) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    assert storages(source.graph.fragment(None, None)).isdisjoint(storages(source.module))
    assert storages(source.graph.fragment(None, None, share=True)) == storages(source.module)


# -- writing in place, randomness ------------------------------------------------------------------------------------


class Between(nn.Module):
    """Convolution, something of the test's, convolution, pooling, linear layer."""

    def __init__(self, step: Callable[[Between, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Linear(5, 7)
        self.relu, self.same, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result = self.step(self, x)
        x = self.b(x if result is None else result)
        return self.head(x.mean((2, 3)))


def statement(write: Callable[[Between, Tensor], object]) -> Callable[[Between, Tensor], None]:
    """A step whose result is thrown away, so that only its writing counts."""

    def step(network: Between, x: Tensor) -> None:
        write(network, x)

    return step


def shown_by_a_view(network: Between, x: Tensor) -> Tensor:
    view = x[:, :]
    x.mul_(2)
    return view * network.b.bias[0]  # reads a parameter, and so leaves the view alone for a moment


@torch.library.custom_op("test_graph::doubled", mutates_args=("x",))
def doubled(x: Tensor) -> None:
    x.mul_(2)


IN_PLACE: dict[str, Callable[[Between, Tensor], object]] = {
    "module": lambda n, x: n.relu(x),
    "module behind an identity": lambda n, x: n.relu(n.same(x)),
    "module behind dropout": lambda n, x: n.relu(n.drop(x)),
    "module on a view": lambda n, x: n.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "method on a view": lambda n, x: x.flatten(2).relu_().unflatten(2, (8, 8)),
    "function": lambda n, x: F.hardswish(x, inplace=True),
    "underscore function": lambda n, x: torch.relu_(x),
    "statement": statement(lambda n, x: x.mul_(2)),
    "statement in two steps": statement(lambda n, x: x.mul_(2).add_(1)),
    "statement on a part": statement(lambda n, x: x[:, 0].mul_(3)),
    "statement of a module": statement(lambda n, x: n.relu(x)),
    "statement of a function": statement(lambda n, x: F.relu(x, inplace=True)),
    "statement of an operator of the user's own": statement(lambda n, x: doubled(x)),
    "statement that a view shows": shown_by_a_view,
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_is_written_in_place_is_neither_lost_nor_written_into_the_input(kind: str) -> None:
    torch.manual_seed(0)
    network = Between(IN_PLACE[kind]).eval()
    graph = CutGraph(network, (3, 8, 8))
    images = noise(2, 3, 8, 8) - 0.5
    assert not torch.equal(network(images), Between(lambda n, x: x).eval()(images))
    for cut in graph.cuts("all"):
        pair = [graph.fragment(None, cut.name), graph.fragment(cut.name, None)]
        assert torch.equal(run_in_a_row(pair, images), network(images))
    assert {"a", "b", "mean"} <= {cut.name for cut in graph.cuts("all")}


def test_what_is_written_into_the_output_is_not_lost() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            x.mul_(2)
            return x

    network = Doubled(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    graph, images = CutGraph(network, (3, 8, 8)), noise(2, 3, 8, 8)
    assert torch.equal(run_in_a_row([graph.fragment(*pair) for pair in ends(graph, "all")], images), network(images))


def test_a_tensor_that_forward_makes_from_nothing_belongs_to_the_fragment_and_not_to_the_source() -> None:
    network = Between(lambda n, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1, 1)).eval()
    attributes = set(vars(network))
    graph, images = CutGraph(network, (3, 8, 8)), noise(2, 3, 8, 8)
    pair = [graph.fragment(None, "a"), graph.fragment("a", None)]
    assert torch.equal(run_in_a_row(pair, images), network(images))
    assert set(vars(network)) == attributes


def dropped(network: Between, x: Tensor) -> Tensor:
    return F.dropout(x, p=0.25, training=network.training)


def dropped_by_channel(network: Between, x: Tensor) -> Tensor:
    return F.dropout2d(x, training=network.training)


@pytest.mark.parametrize(
    "step", [dropped, dropped_by_channel, lambda n, x: n.drop(x)], ids=["function", "by channel", "module"]
)
@pytest.mark.parametrize("traced_in", [True, False])
def test_dropout_of_a_fragment_follows_train_and_eval(
    step: Callable[[Between, Tensor], Tensor], traced_in: bool
) -> None:
    torch.manual_seed(0)
    network = Between(step)
    graph, images = CutGraph(network.train(traced_in), (3, 8, 8)), noise(4, 3, 8, 8)
    fragment = graph.fragment(None, None)
    assert torch.equal(fragment(images), fragment(images)) is not traced_in
    for mode in (True, False, True):
        torch.manual_seed(1)
        expected = network.train(mode)(images)
        torch.manual_seed(1)
        assert torch.equal(fragment.train(mode)(images), expected)
    assert not torch.equal(network.train()(images), network.eval()(images))


def test_stochastic_depth_of_a_fragment_follows_train_and_eval() -> None:
    network = shake(timm.create_model("test_convnext", drop_path_rate=0.5), 0)
    graph, images = CutGraph(network, (3, 64, 64)), noise(8, 3, 64, 64)
    cut = graph.cuts("blocks")[4].name
    pair = [graph.fragment(None, cut), graph.fragment(cut, None)]
    for mode in (True, False):
        torch.manual_seed(1)
        expected = network.train(mode)(images)
        torch.manual_seed(1)
        assert torch.equal(pair[1].train(mode)(pair[0].train(mode)(images)), expected)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda g: g.cuts("layer"),
            r"Unknown granularity 'layer'; choose from \('stages', 'blocks', 'reference', 'all'",
        ),
        (lambda g: g.cuts(["layer1", "layr2"]), r"No cut is named 'layr2'\. Nearest: 'layer2', "),
        (
            lambda g: g.fragment("layer1", "layer33"),
            r"'layer33'\. Nearest: 'layer3', .*cuts\(granularity=\"all\"\) lists",
        ),
        (lambda g: g.macs(None, "maxpol"), r"'maxpol'\. Nearest: 'maxpool', '[\w.]+', '[\w.]+'\. cuts"),
        (lambda g: g.fragment("layer3", "layer1"), "goes forward, but cut 'layer1' does not lie behind 'layer3'"),
        (lambda g: g.fragment("layer3", "layer3"), "cut 'layer3' does not lie behind 'layer3'"),
        (lambda g: g.parameters("layer2", "layer1"), "cut 'layer1' does not lie behind 'layer2'"),
    ],
)
def test_a_wrong_question_is_answered_with_what_there_is(ask: Callable[[CutGraph], object], words: str) -> None:
    with pytest.raises(CutError, match=words):
        ask(shaken("test_resnet").graph)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 4, 3), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x))
        return x if x.sum() > 0 else -x


class TwoOutputs(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().forward(x)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Branching(), r"(?s)Branching cannot be traced: TraceError: .*control flow.*register_notrace_module"),
        (nn.Bilinear(3, 3, 2), r"Bilinear cannot be called with one batch .*: missing a required argument: 'input2'"),
        (
            TwoOutputs(nn.Conv2d(3, 3, 1)),
            "TwoOutputs returns a tuple of 2, not one tensor. Give a part of it that returns one",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "Sequential has no place where exactly one activation tensor is live"),
        (nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU()), r"=0\]\(|network_0.*fails in a dry run: .*channels"),
    ],
    ids=["control flow", "two inputs", "two outputs", "one layer", "wrong channels"],
)
def test_a_network_that_cannot_be_cut_is_an_error_and_keeps_its_modes(network: nn.Module, words: str) -> None:
    network.train()
    list(network.modules())[-1].eval()
    modes = [part.training for part in network.modules()]
    with pytest.raises(CutError, match=words):
        CutGraph(network, (3, 8, 8))
    assert [part.training for part in network.modules()] == modes
