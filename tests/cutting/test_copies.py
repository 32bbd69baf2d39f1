from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from doubles.tensors import noise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_stitch.cutting.graph import CutGraph


class Small(nn.Module):
    """A network by parts that others override."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), 2.0
        self.register_buffer("shift", torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training) * self.scale + self.shift


class LooksAtSizes(Small):
    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x if x.shape[2] > 2 else -x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"test_{kind}": (lambda kind=kind: timm.create_model(f"test_{kind}"), 160)
        for kind in ("resnet", "efficientnet", "nfnet", "vit", "vit_relpos", "maxvit")
    },
    "levit_128s": (lambda: timm.create_model("levit_128s"), 224),
    "squeezenet1_1": (models.squeezenet1_1, 96),
    "swin": (lambda: models.swin_transformer.SwinTransformer([4, 4], 24, [2], [2], [4, 4]), 64),
    "functional dropout": (Small, 16),
    "by example": (LooksAtSizes, 16),
}


def outlined(make: Callable[[], nn.Module], size: int) -> CutGraph:
    with torch.device("meta"):
        network = make()
    return CutGraph(network.eval(), (3, size, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_of_an_outline_is_that_of_the_network_itself(name: str) -> None:
    make, size = NETWORKS[name]
    network = make().eval()
    expected, graph = CutGraph(network, (3, size, size)), outlined(make, size).carry_over(network)
    assert graph is not None
    assert (graph.way, graph.module.training) == (expected.way, expected.module.training)
    assert graph.cuts("all") == expected.cuts("all")
    assert graph.macs(None, None) == expected.macs(None, None)
    assert graph.uncounted == expected.uncounted
    assert set(graph.parameters(None, None)) == set(expected.parameters(None, None))
    assert graph.train_mode_difference() is None
    images, cut = noise(2, 3, size, size), expected.cuts()[0].name
    for ends in ((None, None), (cut, None)):
        first, second = (one.fragment(*ends).eval() for one in (graph, expected))
        x = images if ends[0] is None else expected.fragment(None, cut).eval()(images)
        torch.manual_seed(0)
        dropped = first.train()(x)
        torch.manual_seed(0)
        torch.testing.assert_close(dropped, second.train()(x), rtol=0, atol=0)
        assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("kind", [Small, LooksAtSizes])
def test_a_graph_that_was_carried_over_goes_to_other_sizes(kind: type[Small]) -> None:
    network = kind().eval()
    graph = outlined(kind, 16).carry_over(network)
    assert graph is not None
    assert torch.equal(graph.at((3, 24, 24)).fragment(None, None).eval()(x := noise(2, 3, 24, 24)), network(x))


class MakesATensor(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x + self.shift * 2


class NamesADevice(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape, device=self.shift.device)


class Renamed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Identity()


class Retyped(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6)


@pytest.mark.parametrize(
    ("outline", "make"),
    [
        (MakesATensor, MakesATensor),
        (NamesADevice, NamesADevice),
        (Small, Renamed),
        (Small, Retyped),
    ],
)
def test_where_a_trace_may_depend_on_more_the_network_is_traced_itself(outline: type[Small], make: type[Small]) -> None:
    class Twin(make):  # type: ignore[misc, valid-type]
        """Of one type with the outline, so that the type alone tells nothing."""

    Twin.__init__ = outline.__init__  # type: ignore[method-assign]
    with torch.device("meta"):
        first = Twin()
    Twin.__init__ = make.__init__  # type: ignore[method-assign]
    assert CutGraph(first.eval(), (3, 16, 16)).carry_over(Twin().eval()) is None


def test_numbers_that_a_trace_may_have_read_must_be_the_same() -> None:
    network, twin = Small().eval(), Small().eval()
    assert CutGraph(network, (3, 16, 16)).carry_over(twin) is None
    twin.load_state_dict(network.state_dict())
    assert CutGraph(network, (3, 16, 16)).carry_over(twin) is not None
