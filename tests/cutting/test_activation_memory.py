from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from doubles.outcomes import run_all
from doubles.pools import space_of
from doubles.references import counted_bytes
from doubles.small_sources import donor, live, shake
from doubles.tensors import noise
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.search.space import Filters
from lightning_stitch.sources.views import Preprocess

MAP = 4 * 4 * 8 * 8  # bytes of 4 channels of 8 x 8


class Table(nn.Module):
    """Adds a table that it makes of 8 maps, whatever the number of images."""

    traced_whole = True

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(8, 4, 8, 8).sum(0)


class Layers(nn.Module):
    """A convolution to 4 channels of 8 x 8, and something of the test's behind it."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.norm, self.silu, self.tabular = nn.BatchNorm2d(4), nn.SiLU(inplace=True), Table()
        self.table = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.behind = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.stem(x))


BY_HAND: dict[str, tuple[Callable[[Layers, Tensor], Tensor], float]] = {
    # What is alive at the dearest moment, in maps of 4 channels of 8 x 8; before that it is 1.75, image and first map.
    "a chain": (lambda net, x: net.a(net.a(x)), 2),
    "a wider end": (lambda net, x: net.b(x), 3),
    "a residual block holds its input": (lambda net, x: net.a(net.a(x)) + x, 3),
    "dense connections hold everything": (lambda net, x: torch.cat([x, net.a(x), net.a(x)], 1), 6),
    "what is no longer read is gone": (lambda net, x: net.a(net.a(net.a(net.a(x)))), 2),
    "what is never read goes at once": (lambda net, x: (net.a(x), net.a(x))[1], 2),
    "a norm makes a tensor": (lambda net, x: net.norm(x), 2),
    "an operation in place makes none": (lambda net, x: net.silu(net.a(x)), 2),
    "a view makes none": (lambda net, x: net.a(x).flatten(1).view(-1, 4, 8, 8).transpose(2, 3), 2),
    "a view holds what it is a view of": (lambda net, x: net.b(x[:, :1].expand(-1, 4, -1, -1)), 3),
    "chunks hold what they are of": (lambda net, x: net.a(x).chunk(2, 1)[0] * x[:, :2], 2.5),
    "a parameter is no activation": (lambda net, x: x + net.table.expand(1, 4, 8, 8), 2),
    "a table that is made is one": (lambda net, x: x + (net.table.expand(1, 4, 8, 8) * 2), 3),
    "so is one inside a whole layer": (lambda net, x: net.tabular(x), 10),
    "a norm's statistics count": (lambda net, x: F.softmax(x, 1) + F.layer_norm(F.gelu(x), (8, 8)), 3),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_activations_are_what_can_be_counted_by_hand(kind: str) -> None:
    forward, maps = BY_HAND[kind]
    network = Layers(forward)
    extra = 2 * 4 * 4 if "statistics" in kind else 0  # mean and spread of 4 rows
    assert network_cost(network, (3, 8, 8)).activation_bytes == maps * MAP + extra
    assert CutGraph(network, (3, 8, 8)).activation_bytes(None, None) == maps * MAP + extra


def test_attention_holds_its_weights() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    found = network_cost(Attending(), (4, 16, 16)).activation_bytes
    assert found == counted_bytes(CutGraph(Attending(), (4, 16, 16)).module, (4, 16, 16))
    assert found > 2 * 4 * 256 * 256  # before and behind the softmax


def test_what_is_trained_needs_no_more_in_eval_mode_and_stays_as_it_was() -> None:
    network = Layers(lambda net, x: net.silu(net.norm(net.a(x))) + x)
    network.a.requires_grad_(False)
    before = [parameter.requires_grad for parameter in network.parameters()]
    found = network_cost(network, (3, 8, 8))
    assert [parameter.requires_grad for parameter in network.parameters()] == before
    assert set(before) == {True, False}
    assert network_cost(network.requires_grad_(False), (3, 8, 8)) == found
    assert found.activation_bytes == 3 * MAP


@pytest.mark.parametrize(
    ("native", "fixed_size", "interpolation"),
    [
        (8, False, "bilinear"),
        (8, True, "bilinear"),
        (12, True, "bicubic"),
        (16, True, "nearest"),
        (16, False, "bilinear"),
    ],
)
def test_preprocessing_needs_what_a_real_run_does(native: int, fixed_size: bool, interpolation: str) -> None:
    preprocess = Preprocess(Preprocessing((3, native, native), (0.4,) * 3, (0.3,) * 3, interpolation, fixed_size))
    network = nn.Sequential(preprocess, nn.Conv2d(3, 1, 4, 4))
    expected = counted_bytes(CutGraph(network, (3, 8, 8)).module, (3, 8, 8))
    assert network_cost(network, (3, 8, 8)).activation_bytes == expected


class Viewing(nn.Module):
    """Takes its maps apart by `view`, as many hand-written networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.three, self.head = nn.Linear(8 * 8 * 8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.three(x.view(x.size(0), -1))))


@pytest.mark.parametrize("sender", ["test_convnext", "test_mambaout"])
def test_a_receiver_may_view_what_a_stitch_gives_in_another_order_of_memory(sender: str) -> None:
    space = space_of([donor(sender), live(shake(Viewing(), 0), "viewing", size=64)], noise(8, 3, 64, 64))
    parts = [source.parts for source in space.sources]
    state, images, entered = space.starts()[0], noise(3, 3, 64, 64, seed=1), 0
    for cut, x in space.walk(state):
        for edge in space.edges(state, cut, x, Filters(min_cka=-9, min_product=-9)):
            if edge.source == 1:
                candidate = space.complete(space.enter(edge, x))
                (outcome,) = run_all([candidate], parts, [images])
                assert outcome.features.shape == (3, 10)
                entered += parts[1].cuts[edge.receiver].format == "NCHW"
    assert entered > 3
