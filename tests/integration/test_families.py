"""Families that differ most in how their activations flow; tests/benchmarks/cut_survey.py tries all of timm's."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from doubles.references import counted_macs
from torch import Tensor, nn

from lightning_stitch import CutError, CutGraph

# name, input size, least cuts, formats among them
FAMILIES = [
    ("densenet121", 64, 15, {"NCHW", "vector"}),
    ("ghostnet_050", 64, 20, {"NCHW", "vector"}),
    ("regnetx_002", 64, 20, {"NCHW", "vector"}),
    ("convnext_atto", 64, 30, {"NCHW", "NHWC", "vector"}),
    ("mambaout_femto", 64, 30, {"NCHW", "NHWC", "vector"}),
    ("vit_tiny_patch16_224", 224, 30, {"NCHW", "tokens", "vector"}),
    ("vit_tiny_r_s16_p8_224", 224, 30, {"NCHW", "tokens", "vector"}),
    ("vit_tiny_patch16_dinov3_qkvb", 256, 20, {"NCHW", "NHWC", "tokens", "vector"}),
    ("cait_xxs24_224", 224, 20, {"NCHW", "tokens", "vector"}),
    ("swin_tiny_patch4_window7_224", 224, 40, {"NCHW", "NHWC", "tokens", "vector"}),
    ("levit_128s", 224, 30, {"NCHW", "tokens", "vector"}),
    ("mobilevit_xxs", 64, 40, {"NCHW", "vector"}),
    ("efficientformer_l1", 224, 30, {"NCHW", "tokens", "vector"}),
    ("poolformerv2_s12", 64, 30, {"NCHW", "NHWC", "vector"}),
]

# Fewer of the same blocks, where there are many.
SHALLOWER: dict[str, dict[str, Any]] = {
    "densenet121": {"block_config": (3, 4, 6, 4)},
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 6},
    "cait_xxs24_224": {"depth": 6},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2)},
    "convit_tiny": {"depth": 4, "local_up_to_layer": 3},
    "efficientvit_m0": {"depth": (1, 1, 1)},
    "crossvit_tiny_240": {"depth": ((1, 2, 0), (1, 2, 0))},
}


def create(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=7, **SHALLOWER.get(name, {}))


def shaken(network: nn.Module) -> nn.Module:
    """Some heads begin at zero, and zero is easily reproduced."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@cache
def family(name: str, size: int) -> tuple[nn.Module, CutGraph]:
    network = shaken(create(name))
    return network, CutGraph(network, (3, size, size))


def ends(graph: CutGraph) -> list[tuple[str | None, str | None]]:
    names = [None, *(cut.name for cut in graph.cuts("blocks")), None]
    return list(pairwise(names))


@pytest.mark.parametrize(("name", "size", "least", "formats"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_a_family_is_cut_and_recomposed_bit_for_bit(name: str, size: int, least: int, formats: set[str]) -> None:
    network, graph = family(name, size)
    cuts = graph.cuts("all")
    assert len(cuts) >= least
    assert {cut.format for cut in cuts} == formats
    assert graph.way == "symbolic"
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        x = images
        for start, end in ends(graph):
            x = graph.fragment(start, end, share=True)(x)
        assert torch.equal(x, network(images))
    owned = Counter(id(p) for start, end in ends(graph) for p in graph.parameters(start, end))
    assert owned == Counter(id(p) for p in network.parameters())


@pytest.mark.parametrize(("name", "size"), [family[:2] for family in FAMILIES])
def test_a_familys_macs_are_those_of_the_flop_counter_and_add_up_over_its_fragments(name: str, size: int) -> None:
    network, graph = family(name, size)
    assert graph.macs(None, None) == counted_macs(network, (3, size, size))
    assert sum(graph.macs(start, end) for start, end in ends(graph)) == graph.macs(None, None)
    assert graph.uncounted == ()


class LooksAtSizes(nn.Module):
    """Python that asks for dimensions, lengths and sizes, which torch.fx alone cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 4).view(1, 4, 1))
        self.stem, self.layers = nn.Conv2d(3, 4, 4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError("images have four dimensions")
        x = self.stem(x).flatten(2)
        x = x * self.scale.expand(1, x.shape[1], x.shape[2])
        x = x + torch.arange(x.shape[2])
        x = x.transpose(1, 2)
        for _, layer in zip(range(x.shape[1]), self.layers, strict=False):
            x = x + layer(x)
        return self.head(torch.stack([x[:, i] for i in range(int(x.shape[1]))]).mean(0))


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.mean() > 0 else x


def test_a_network_that_looks_at_sizes_is_traced_by_example() -> None:
    network = shaken(LooksAtSizes())
    graph = CutGraph(network, (3, 16, 16))
    assert graph.way == "example"
    assert "stem" in {cut.name for cut in graph.cuts("all")}
    for at in (graph, graph.at((3, 24, 24))):
        images = torch.rand(5, *at.input_size)
        for cut in at.cuts("all"):
            x = at.fragment(cut.name, None)(at.fragment(None, cut.name)(images))
            assert torch.equal(x, network(images))


def test_tracing_by_example_leaves_the_process_as_it_was() -> None:
    arange, modes = torch.arange, [module.training for module in LooksAtSizes().modules()]
    network = LooksAtSizes()
    CutGraph(network, (3, 16, 16))
    assert torch.arange is arange
    assert [module.training for module in network.modules()] == modes
    assert CutGraph(timm.create_model("test_vit"), (3, 160, 160)).way == "symbolic"


def test_what_depends_on_values_is_refused_with_the_line_that_stopped_it() -> None:
    with pytest.raises(CutError, match=r"LooksAtValues cannot be traced: TraceError") as refused:
        CutGraph(LooksAtValues(), (3, 16, 16))
    assert "It stopped in forward at `return self.layer(x) if x.mean() > 0 else x`" in str(refused.value)


def test_branches_side_by_side_are_no_cut_and_the_error_says_so() -> None:
    with pytest.raises(CutError, match="CrossVit has no place where exactly one activation tensor is live: its branch"):
        CutGraph(create("crossvit_tiny_240"), (3, 240, 240))


@pytest.mark.parametrize(("name", "size"), [("convit_tiny", 224), ("efficientvit_m0", 224), ("levit_128s", 224)])
def test_networks_that_cache_what_passes_through_them_still_work_after_cutting(name: str, size: int) -> None:
    network = shaken(create(name))
    images = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        expected = copy.deepcopy(network)(images)
        CutGraph(network, (3, size, size))
        assert torch.equal(network(images), expected)
    again = CutGraph(network, (3, size, size))
    copy.deepcopy(network)
    with torch.inference_mode():
        assert torch.equal(again.fragment(None, None, share=True)(images), expected)
