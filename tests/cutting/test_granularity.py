from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from doubles.small_sources import donor, live
from doubles.tensors import noise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_stitch.cutting.graph import Cut, CutGraph
from lightning_stitch.errors import CutError

TIMM = timm.list_models("test_*")
OTHER_SIZE = [name for name in TIMM if name not in ("test_coatnet", "test_maxvit", "test_vit3", "test_vit_relpos")]

shaken = cache(donor)


@cache
def torchvision_graph(name: str) -> CutGraph:
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
    return CutGraph(network.eval(), (3, 224, 224))


def formats(graph: CutGraph) -> dict[str, str]:
    return {cut.name: cut.format for cut in graph.cuts("all")}


# -- which cuts are offered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("alexnet", [(64, 27, 27), (192, 13, 13), (384, 13, 13), (256, 13, 13), (9216,), (4096,), (4096,)]),
        ("densenet121", [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (1024,)]),
        ("resnet50", [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048,)]),
    ],
)
def test_reference_cuts_have_the_shapes_of_the_authors_fragments(name: str, shapes: list[tuple[int, ...]]) -> None:
    assert [cut.shape for cut in torchvision_graph(name).cuts("reference")] == shapes


@pytest.mark.parametrize(
    ("name", "fragments"),
    [("alexnet", 8), ("densenet121", 5), ("mobilenet_v3_small", 13), ("resnet50", 6), ("vgg16", 16)],
)
def test_reference_cuts_make_as_many_fragments_as_the_authors(name: str, fragments: int) -> None:
    assert len(torchvision_graph(name).cuts("reference")) + 1 == fragments


def test_reference_cuts_are_inputs_of_dense_layers_behind_the_first_one() -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.grouped, self.left, self.right = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.shortcut, self.pool, self.linear = nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x * 2))  # the first layer's input does not count
            x = F.relu(self.second(x))  # read by a grouped convolution
            x = self.grouped(x)  # read by two convolutions
            x = torch.sigmoid(self.left(x) + self.right(x))  # read by a convolution and by something else
            x = x + self.shortcut(x)
            return self.linear(self.pool(x).flatten(1)).exp()

    chosen = CutGraph(Readers(), (3, 8, 8)).cuts("reference")
    assert [cut.name for cut in chosen] == ["relu", "grouped", "flatten"]


BLOCKS = {
    "resnet18": "maxpool layer1.0 layer1 layer2.0 layer2 layer3.0 layer3 layer4.0 avgpool",
    "densenet121": "features.pool0 features.denseblock1 features.transition1 features.denseblock2 features.transition2 "
    "features.denseblock3 features.transition3 features",
    "mobilenet_v3_small": " ".join(f"features.{index}" for index in range(12)) + " avgpool classifier.2",
    "vgg11": "features.2 features.5 features.7 features.10 features.12 features.15 features.17 avgpool classifier.2 "
    "classifier.5",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_usual_networks(name: str) -> None:
    # Pooling, norms and activations belong to the fragment before, so a block's name may be theirs.
    assert [cut.name for cut in torchvision_graph(name).cuts()] == BLOCKS[name].split()


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.expand, self.project, self.shortcut = nn.Conv2d(inputs, 8, 1), nn.Conv2d(8, outputs, 1), inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu(self.expand(x)))
        return x + y if self.shortcut else y


def test_a_block_without_shortcut_is_not_taken_to_pieces_where_its_siblings_have_one() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Inverted(4, 6), Inverted(6, 6), Inverted(6, 5), nn.Conv2d(5, 5, 1))
    graph = CutGraph(network, (3, 8, 8))
    assert [cut.name for cut in graph.cuts("blocks")] == ["0", "1", "2", "3"]
    assert {"1.expand", "3.expand"} <= {cut.name for cut in graph.cuts("all")}


def test_a_trunk_may_hold_a_few_parts_that_other_ones_pass_by() -> None:
    class PassedBy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abcde":
                self.add_module(name, Inverted(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return self.e(x + self.d(self.c(x)))

    network = nn.Sequential(nn.Conv2d(3, 4, 1), PassedBy(), nn.Conv2d(4, 4, 1))
    assert [cut.name for cut in CutGraph(network, (3, 8, 8)).cuts("blocks")] == ["0", "1.a", "1.b", "1"]


def test_the_trunk_is_found_where_what_lies_between_its_parts_is_no_map() -> None:
    class Stage(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1, 2)).unflatten(1, (2, 2))

    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Unflatten(1, (2, 2)))
    trunk = nn.Sequential(stem, *(Stage(Inverted(4, 4), Inverted(4, 4)) for _ in range(3)))
    network = nn.Sequential(trunk, nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(4, 4, 1)))
    chosen = [cut.name for cut in CutGraph(network, (3, 8, 8)).cuts("blocks")]
    # "1.0", the flattened output of the last block, is directly before the head's weights.
    assert chosen == ["0.0.0", "0.1.0", "0.1.1", "0.2.0", "0.2.1", "0.3.0", "1.0"]


@pytest.mark.parametrize("name", TIMM)
def test_every_block_has_weights_and_stages_end_where_the_grid_changes(name: str) -> None:
    graph = shaken(name).graph
    blocks = graph.cuts("blocks")
    ends = [None, *(cut.name for cut in blocks), None]
    for start, end in pairwise(ends):
        assert any(parameter.ndim >= 2 for parameter in graph.fragment(start, end).parameters())
    kept = [cut for cut, after in zip(blocks, [*blocks[1:], None], strict=True) if not after or after.grid != cut.grid]
    assert graph.cuts("stages") == kept
    assert set(blocks) <= set(graph.cuts("all"))
    assert set(graph.cuts("reference")) <= set(graph.cuts("all"))


def test_a_list_of_names_gives_these_cuts_in_forward_order() -> None:
    graph = shaken("test_resnet").graph
    assert [cut.name for cut in graph.cuts(["layer3", "maxpool", "layer1"])] == ["maxpool", "layer1", "layer3"]


# -- what a cut says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_maxvit", "test_vit2", "test_convnext"])
def test_a_cuts_name_is_the_module_whose_output_it_is(name: str) -> None:
    source, outputs = shaken(name), {}
    modules = dict(source.module.named_modules())
    cuts = [cut for cut in source.cuts("all") if cut.name in modules]
    handles = [
        modules[cut.name].register_forward_hook(lambda _m, _x, y, key=cut.name: outputs.update({key: y.clone()}))
        for cut in cuts
    ]
    images = noise(2, *source.preprocessing.input_size)
    with torch.no_grad():
        source.module(images)
        for handle in handles:
            handle.remove()
        assert len(outputs) >= 5
        for cut in cuts:
            assert torch.equal(source.fragment(None, cut.name)(images), outputs[cut.name])
            assert outputs[cut.name].shape == (2, *cut.shape)


def test_a_cut_is_found_by_any_module_whose_output_it_is() -> None:
    graph = shaken("test_resnet").graph
    assert graph.find("layer1") == graph.find("layer1.0") == graph.find("layer1.0.act2")
    assert graph.find("layer1") != graph.find("layer2")
    assert graph.fragment("layer1.0", "layer2.0").code == graph.fragment("layer1", "layer2").code


def test_a_module_that_is_called_twice_gives_two_cuts() -> None:
    act = nn.ReLU()
    graph = CutGraph(nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 6, 3), act, nn.Conv2d(6, 6, 1)), (3, 8, 8))
    assert [(cut.name, cut.shape) for cut in graph.cuts("all")] == [
        ("0", (4, 6, 6)),
        ("1", (4, 6, 6)),
        ("2", (6, 4, 4)),
        ("1@2", (6, 4, 4)),
    ]


@pytest.mark.parametrize("name", OTHER_SIZE)
def test_channels_are_what_does_not_depend_on_the_image_size(name: str) -> None:
    graph = shaken(name).graph
    other = {cut.name: cut for cut in graph.at((3, 96, 96)).cuts("all")}
    maps = [cut for cut in graph.cuts("all") if cut.grid is not None and cut.name in other]
    assert len(maps) > 5
    for cut in maps:
        smaller = other[cut.name]
        assert (smaller.channels, smaller.format) == (cut.channels, cut.format)
        assert cut.grid
        assert cut.stride
        assert smaller.grid
        assert cut.grid[0] == cut.grid[1] == 160 / cut.stride
        assert smaller.grid[0] < cut.grid[0] or cut.grid == (1, 1)


def test_fields_of_cuts_of_every_format() -> None:
    vit, maxvit = shaken("test_vit").graph, shaken("test_maxvit").graph
    found = [vit.find("patch_embed.proj"), vit.find("blocks.2"), vit.find("fc_norm")]
    found.append(maxvit.find("stages.1.blocks.0.attn_grid"))
    told = [(cut.format, cut.shape, cut.channels, cut.grid, cut.stride, cut.num_prefix_tokens) for cut in found]
    assert told == [
        ("NCHW", (64, 10, 10), 64, (10, 10), 16, 0),
        ("tokens", (101, 64), 64, (10, 10), 16, 1),
        ("vector", (64,), 64, None, None, 0),
        ("NHWC", (20, 20, 64), 64, (20, 20), 8, 0),
    ]


class Tail(nn.Module):
    """A convolution to 16 channels on a 4x4 grid, then what the test does."""

    def __init__(self, rest: Callable[[Tail, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 16)
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, self.conv(x))


def residual(n: Tail, x: Tensor) -> Tensor:
    return x + n.mix(n.norm(x))


def windowed(n: Tail, x: Tensor) -> Tensor:
    """As Swin has it: what makes the sum and what reads it are reshapes, only a sibling tells its layout."""
    x = x.flatten(2).transpose(1, 2).reshape(-1, 4, 4, 16)
    x = x + n.mix(n.norm(x)).reshape(-1, 2, 8, 16).reshape(-1, 4, 4, 16)
    return n.head(x.reshape(-1, 16, 16).mean(1))


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (lambda n, x: n.head(n.flatten(n.pool(x))), {"conv": "NCHW", "pool": "NCHW", "flatten": "vector"}),
        (
            lambda n, x: n.head(n.pool(x).squeeze(-1).squeeze(-1)),
            {"conv": "NCHW", "pool": "NCHW", "squeeze_1": "vector"},
        ),
        (lambda n, x: n.head(torch.flatten(n.pool(x), 1)), {"conv": "NCHW", "pool": "NCHW", "flatten": "vector"}),
        (lambda n, x: n.head(x.mean((2, 3))), {"conv": "NCHW", "mean": "vector"}),
        (lambda n, x: n.head(x.mean(3).mean(2)), {"conv": "NCHW", "mean_1": "vector"}),
        (lambda n, x: n.head(x.amax((2, 3))), {"conv": "NCHW", "amax": "vector"}),
        (
            lambda n, x: n.head(residual(n, x.flatten(2).transpose(1, 2)).mean(1)),
            {"conv": "NCHW", "transpose": "tokens", "add": "tokens", "mean": "vector"},
        ),
        (
            lambda n, x: n.head(residual(n, x.reshape(x.shape[0], 16, 16).permute(0, 2, 1))[:, 0]),
            {"conv": "NCHW", "permute": "tokens", "add": "tokens", "getitem_1": "vector"},
        ),
        (
            lambda n, x: n.head(residual(n, x.permute(0, 2, 3, 1)).mean((1, 2))),
            {"conv": "NCHW", "permute": "NHWC", "add": "NHWC", "mean": "vector"},
        ),
        (
            lambda n, x: n.head(n.pool(residual(n, x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)).flatten(1)),
            {
                **{"conv": "NCHW", "permute": "NHWC", "add": "NHWC", "relu": "NHWC", "permute_1": "NCHW"},
                **{"pool": "NCHW", "flatten": "vector"},
            },
        ),
        (
            windowed,
            {
                **{"conv": "NCHW", "reshape": "NHWC", "add": "NHWC"},
                **{"reshape_3": "tokens", "mean": "vector"},
            },
        ),
    ],
)
def test_the_layout_of_a_cut_is_read_off_the_operations(
    rest: Callable[[Tail, Tensor], Tensor], expected: dict[str, str]
) -> None:
    # 16 channels on 16 positions: the shape alone does not tell which is which.
    assert formats(CutGraph(Tail(rest), (3, 16, 16))) == expected


def test_tokens_that_fill_no_grid_are_no_cut() -> None:
    def with_ten_more(n: Tail, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return n.head(residual(n, torch.cat([tokens, tokens[:, :10]], dim=1)).mean(1))

    assert {"cat", "add"} & set(formats(CutGraph(Tail(with_ten_more), (3, 16, 16)))) == set()


def test_tokens_of_an_oblong_image_make_an_oblong_grid() -> None:
    graph = CutGraph(Tail(lambda n, x: n.head(residual(n, x.flatten(2).transpose(1, 2)).mean(1))), (3, 16, 16))
    square, oblong = (graph.at((3, 16, width)).find("add") for width in (16, 32))
    assert square.grid is not None
    assert oblong.grid == (square.grid[0], 2 * square.grid[1])
    assert (square.num_prefix_tokens, oblong.num_prefix_tokens) == (0, 0)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_tokens_are_found_where_the_network_does_not_tell_them(prefix: int) -> None:
    def with_prefix(n: Tail, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return n.head(residual(n, torch.cat([tokens[:, :prefix], tokens], dim=1)).mean(1))

    cut = CutGraph(Tail(with_prefix), (3, 16, 16)).find("add")
    assert cut.num_prefix_tokens == prefix
    assert cut.grid is not None
    assert cut.shape[0] == prefix + cut.grid[0] * cut.grid[1]


# -- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_the_feature_cut_is_what_timms_classifier_reads(name: str) -> None:
    source = shaken(name)
    cut = source.graph.feature_cut()
    assert isinstance(cut, Cut)
    network, images = source.module, noise(2, *source.preprocessing.input_size)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)  # type: ignore[operator]
        assert torch.equal(source.fragment(None, cut.name)(images), expected)
    assert (cut.format, cut.channels) == ("vector", expected.shape[1])
    assert source.graph.output_features() == 1000


def test_the_output_is_the_feature_where_there_is_no_classifier() -> None:
    source = live(timm.create_model("test_resnet", num_classes=0), "headless", size=64)
    assert source.graph.feature_cut() is None
    assert source.graph.output_features() == 96


@pytest.mark.parametrize("squeezed", [True, False])
def test_the_output_is_the_feature_where_the_classifier_is_a_convolution(squeezed: bool) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1)]
    graph = CutGraph(nn.Sequential(*layers, *([nn.Flatten()] if squeezed else [])), (3, 8, 8))
    if squeezed:
        assert graph.feature_cut() is None
    else:
        with pytest.raises(CutError, match=r"Sequential has no feature vector: its output is not \(batch, features\)"):
            graph.feature_cut()
