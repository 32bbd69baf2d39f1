from __future__ import annotations

import itertools

import pytest
import timm
import torch
from doubles.small_sources import shake
from torch import nn

from lightning_stitch.cutting.fusing import fuse
from lightning_stitch.cutting.graph import CutGraph


class Twice(nn.Module):
    """Two convolutions that are no pair with the BatchNorm behind them, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.alone = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(self.norm(self.first(x)).relu())).relu()
        y = self.alone(x)
        return (self.last(y) + y).mean((2, 3))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet", "tf_mobilenetv3_small_minimal_100"]
)
def test_fragments_give_the_same_fused(name: str) -> None:
    network = shake(timm.create_model(name, num_classes=5), 0).eval()
    graph, x = CutGraph(network, (3, 64, 64)), torch.rand(4, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ends = [None, *(cut.name for cut in graph.cuts("blocks")), None]
    norms = 0
    with torch.inference_mode():
        for start, end in itertools.pairwise(ends):
            fragment = graph.fragment(start, end, share=True)
            fused = fuse(fragment)
            norms += sum(isinstance(m, nn.BatchNorm2d) for n in called(fragment) for m in [fragment.get_submodule(n)])
            assert not any(isinstance(fused.get_submodule(n), nn.BatchNorm2d) for n in called(fused))
            y = fragment(x)
            torch.testing.assert_close(fused(x), y, atol=1e-4, rtol=1e-4)
            x = y
    assert (norms > 0) == (name != "test_nfnet")
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.is_contiguous()


def called(fragment: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in fragment.graph.nodes if node.op == "call_module"]


def test_layers_that_are_called_twice_or_read_elsewhere_stay() -> None:
    network = shake(Twice(), 1).eval()
    fragment = CutGraph(network, (3, 8, 8)).fragment(None, None, share=True)
    assert fuse(fragment) is fragment


def test_a_convolution_with_a_hook_or_weights_of_another_kind_stays() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    fragment = CutGraph(plain, (3, 8, 8)).fragment(None, None, share=True)
    assert isinstance(fuse(fragment).get_submodule("1"), nn.Identity)
    nn.utils.parametrizations.weight_norm(plain[0])
    fragment = CutGraph(plain, (3, 8, 8)).fragment(None, None, share=True)
    assert fuse(fragment) is fragment


def test_convolutions_are_channels_last_and_nothing_trains() -> None:
    network = shake(timm.create_model("test_resnet"), 0).eval()
    fused = fuse(CutGraph(network, (3, 64, 64)).fragment(None, "layer1"))
    assert fused(torch.rand(2, 3, 64, 64)).is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in fused.parameters())
