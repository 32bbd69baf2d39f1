from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest
import timm.layers
import torch
from doubles.small_sources import donor, shake
from doubles.stitches import filled, joined
from doubles.tensors import noise, seeded
from torch import Tensor, fx, nn

from lightning_stitch.cutting.graph import Cut, CutGraph
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import CutError
from lightning_stitch.recipe import Format, Placement, StitchSpec
from lightning_stitch.stitching.folding import (
    PLACES,
    Entering,
    Leaving,
    cheapest_places,
    consumer_layers,
    fold_into_consumer,
    fold_into_producer,
    producer_layers,
    stitch_cost,
)
from lightning_stitch.stitching.stitches import is_bridgeable, stitch_spec


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def small(name: str) -> CutGraph:
    return donor(name).graph.at((3, 64, 64))


def exact_placements(before: fx.GraphModule, spec: StitchSpec, after: fx.GraphModule) -> list[Placement]:
    options: list[Placement] = ["explicit"]
    options += ["producer"] if producer_layers(before) else []
    options += ["consumer"] if consumer_layers(after, bias=spec.bias) and not spec.out_prefix_tokens else []
    return options


def assert_folds_are_exact_and_cost_what_is_said(
    before: fx.GraphModule, spec: StitchSpec, after: fx.GraphModule, images: Tensor
) -> list[Placement]:
    """Every possible fold gives what the explicit stitch gives, and `stitch_cost` is what counting finds."""
    stitch = filled(spec)
    explicit = joined(before, stitch, after, "explicit")
    expected, met = explicit(images), explicit[:2](images)
    unstitched = network_cost(before, images.shape[1:]) + network_cost(after, met.shape[1:])  # type: ignore[arg-type]
    placements = exact_placements(before, spec, after)
    for placement in placements:
        network = joined(before, stitch, after, placement)
        assert (network(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
        whole = network_cost(network, images.shape[1:])  # type: ignore[arg-type]
        added = (whole.params - unstitched.params, whole.macs - unstitched.macs)
        assert stitch_cost(spec, before, after, placement) == added
    return placements


# -- fragments of real networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "leaves", "receiver", "enters", "placements"),
    [
        # convolution and BatchNorm -> pointwise convolution
        ("test_efficientnet", "blocks.1", "test_efficientnet_gn", "blocks.2", ["producer", "consumer"]),
        ("test_resnet", "conv1", "test_convnext", "stages.1.downsample.0", ["producer", "consumer"]),
        ("test_mambaout", "head.pre_logits.fc", "test_resnet", "global_pool", ["producer", "consumer"]),
        # map -> tokens with a class token, map -> vector, tokens -> map
        ("test_vit", "patch_embed.proj", "test_vit", "blocks.2", ["producer"]),
        ("test_efficientnet", "conv_head", "test_vit", "head_drop", ["producer", "consumer"]),
        ("test_vit", "blocks.2", "test_efficientnet", "blocks.3", ["consumer"]),
        # a padded consumer
        ("test_convnext", "stages.1.downsample", "test_resnet", "conv1.2", ["producer"]),
    ],
)
def test_folds_between_real_fragments(
    sender: str, leaves: str, receiver: str, enters: str, placements: list[Placement]
) -> None:
    sends, receives = small(sender).find(leaves), small(receiver).find(enters)
    before, after = small(sender).fragment(None, sends.name), small(receiver).fragment(receives.name, None)
    spec = stitch_spec(sends, receives, bias=True)
    found = assert_folds_are_exact_and_cost_what_is_said(before, spec, after, noise(2, 3, 64, 64))
    assert found == ["explicit", *placements]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_resnet"])
def test_every_foldable_cut_of_a_network_folds_exactly(name: str) -> None:
    graph, images, seen = small(name), noise(2, 3, 64, 64), []
    cuts = graph.cuts("all")
    for sends, receives in product(cuts[1::4], cuts[2::5]):
        if is_bridgeable(sends, receives):
            before, after = graph.fragment(None, sends.name), graph.fragment(receives.name, None)
            stitch = filled(stitch_spec(sends, receives, bias=True))
            expected = joined(before, stitch, after, "explicit")(images)
            for placement in exact_placements(before, stitch.spec, after)[1:]:
                folded = joined(before, stitch, after, placement)(images)
                assert (folded - expected).abs().max() <= 1e-4 * expected.abs().max()
                seen.append(placement)
    assert seen


# -- fragments by hand -----------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Layers by name, and the test's own forward."""

    def __init__(self, forward: Callable[[Steps, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def traced(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(shake(module, 3)).eval())


def cut(format: Format, channels: int, side: int, prefix: int = 0) -> Cut:
    shape = {"NCHW": (channels, side, side), "tokens": (prefix + side * side, channels), "vector": (channels,)}
    shape["NHWC"] = (side, side, channels)
    grid = None if format == "vector" else (side, side)
    return Cut("cut", format, shape[format], grid, None, prefix, 0)


def tokens(layer: nn.Module, prefix: int = 0) -> Steps:
    """A map as tokens, the first ones twice for want of others, and then a layer."""

    def forward(n: Steps, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return n.layer(torch.cat([x[:, :prefix], x], 1) if prefix else x)

    return Steps(forward, layer=layer)


def after_pooling(layer: nn.Module) -> Steps:
    return Steps(lambda n, x: n.layer(x.mean((2, 3))), layer=layer)


SENDER = traced(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()))
RECEIVER = traced(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU()))
SENDS, RECEIVES = cut("NCHW", 5, 8), cut("NCHW", 6, 8)

CONSUMERS: dict[str, tuple[Cut, nn.Module]] = {
    "pointwise": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, 1, bias=False)),
    "unpadded, stride 2": (cut("NCHW", 6, 9), nn.Sequential(nn.Conv2d(6, 4, 3, stride=2), nn.ReLU())),
    "valid, dilated": (cut("NCHW", 6, 9), nn.Conv2d(6, 4, (3, 2), dilation=2, padding="valid")),
    "reflected": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
    "replicated": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, (2, 3), padding="same", padding_mode="replicate")),
    "circular": (cut("NCHW", 6, 4), nn.Conv2d(6, 4, 3, stride=2, padding=(1, 2), padding_mode="circular")),
    "two branches": (
        cut("NCHW", 6, 8),
        Steps(lambda n, x: n.a(x) * n.b(x)[:, :, 1:, 1:], a=nn.Conv2d(6, 4, 2), b=nn.Conv2d(6, 4, 1, bias=False)),
    ),
    "linear": (cut("vector", 6, 1), nn.Sequential(nn.Linear(6, 4), nn.ReLU())),
    "linear on tokens": (cut("tokens", 6, 4), nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU())),
    "linear on NHWC": (cut("NHWC", 6, 4), nn.Sequential(nn.Linear(6, 4), nn.ReLU())),
}
ZERO_PADDED: dict[str, tuple[Cut, nn.Module]] = {
    "padded": (cut("NCHW", 6, 9), nn.Conv2d(6, 4, 3, stride=2, padding=1)),
    "same": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, 3, padding="same", dilation=2)),
    "same, even kernel": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, 2, padding="same", bias=False)),
    "padded on one side": (cut("NCHW", 6, 8), nn.Conv2d(6, 4, (1, 3), padding=(0, 1))),
}
PRODUCERS: dict[str, tuple[Cut, nn.Module]] = {
    "convolution": (cut("NCHW", 5, 8), nn.Conv2d(3, 5, 3, padding=1)),
    "convolution without bias": (cut("NCHW", 5, 4), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 5, 2, 2, bias=False))),
    "BatchNorm": (cut("NCHW", 5, 6), nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=0.1))),
    "BatchNorm, no bias": (cut("NCHW", 5, 6), nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))),
    "BatchNorm, dropout": (
        cut("NCHW", 5, 8),
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.Identity(), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.Identity()),
    ),
    "linear": (cut("vector", 5, 1), after_pooling(nn.Linear(3, 5))),
    "linear without bias": (cut("vector", 5, 1), after_pooling(nn.Linear(3, 5, bias=False))),
    "linear on tokens": (cut("tokens", 5, 8), tokens(nn.Linear(3, 5))),
    "linear on prefix tokens too": (cut("tokens", 5, 8, prefix=2), tokens(nn.Linear(3, 5), prefix=2)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CONSUMERS)
def test_folds_into_consumers(kind: str, bias: bool) -> None:
    receives, module = CONSUMERS[kind]
    spec = stitch_spec(SENDS, receives, bias=bias)
    assert assert_folds_are_exact_and_cost_what_is_said(SENDER, spec, traced(module), noise(2, 3, 8, 8)) == [
        "explicit",
        "consumer",
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", ZERO_PADDED)
def test_without_a_bias_folds_into_padded_consumers(kind: str) -> None:
    receives, module = ZERO_PADDED[kind]
    spec = stitch_spec(SENDS, receives, bias=False)
    assert assert_folds_are_exact_and_cost_what_is_said(SENDER, spec, traced(module), noise(2, 3, 8, 8)) == [
        "explicit",
        "consumer",
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", [8, 3])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_folds_into_producers(kind: str, grid: int, bias: bool) -> None:
    sends, module = PRODUCERS[kind]
    receives = cut("vector", 6, 1) if sends.format == "vector" else cut("NCHW", 6, grid)
    after = traced(nn.Sequential(nn.ReLU(), nn.Linear(6, 4))) if sends.format == "vector" else RECEIVER
    spec = stitch_spec(sends, receives, bias=bias)
    assert assert_folds_are_exact_and_cost_what_is_said(traced(module), spec, after, noise(2, 3, 8, 8)) == [
        "explicit",
        "producer",
    ]


def test_batch_norm_without_weights_of_its_own_folds_too() -> None:
    before = traced(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity()))
    norm = nn.BatchNorm2d(5, affine=False).eval()
    norm.running_mean.normal_(generator=seeded(0))  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2, generator=seeded(0))  # type: ignore[union-attr]
    before.set_submodule("0.1", norm)
    spec = stitch_spec(cut("NCHW", 5, 6), RECEIVES, bias=True)
    placements = assert_folds_are_exact_and_cost_what_is_said(before, spec, RECEIVER, noise(2, 3, 8, 8))
    assert placements == ["explicit", "producer"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", ZERO_PADDED)
def test_a_bias_does_not_go_into_a_zero_padded_convolution_because_its_border_would_be_wrong(kind: str) -> None:
    receives, module = ZERO_PADDED[kind]
    x = noise(2, 5, *(receives.grid or ()))
    after, stitch = traced(module), filled(stitch_spec(cut("NCHW", 5, x.shape[-1]), receives, bias=True))
    assert consumer_layers(after, bias=True) is None
    with pytest.raises(CutError, match="cannot be folded into the fragment behind it"):
        fold_into_consumer(after, stitch)

    def convolution(fragment: fx.GraphModule) -> nn.Conv2d:
        return next(part for part in fragment.modules() if isinstance(part, nn.Conv2d))

    forced = copy.deepcopy(after)
    convolution(forced).padding = "valid"
    fold_into_consumer(forced, stitch)
    convolution(forced).padding = convolution(after).padding
    error = (forced(x) - after(stitch(x))).abs().amax((0, 1))
    assert error[2:-2, 2:-2].max() < 1e-5
    assert error.max() > 0.1


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def hooked_before(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        RECEIVER,
        nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 1)),
        nn.Sequential(timm.layers.StdConv2d(6, 4, 1)),
        Steps(lambda n, x: n.conv(n.conv(x)), conv=nn.Conv2d(6, 6, 1)),
        Steps(lambda n, x: x + n.conv(x), conv=nn.Conv2d(6, 6, 1)),
        Steps(lambda n, x: n.a(x) + n.b(x), a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1, groups=6)),
        hooked(nn.Conv2d(6, 4, 1)),
        hooked_before(nn.Conv2d(6, 4, 1)),
    ],
    ids=[
        *("activation", "grouped", "norm", "transposed", "standardised", "used twice", "shortcut"),
        *("one of two grouped", "hook", "hook before"),
    ],
)
def test_consumers_that_would_not_be_exact(module: nn.Module, bias: bool) -> None:
    after = traced(module)
    assert consumer_layers(after, bias=bias) is None
    with pytest.raises(CutError, match="not all its readers are dense layers"):
        fold_into_consumer(after, filled(stitch_spec(SENDS, RECEIVES, bias=bias)))


def written(n: Steps, x: Tensor) -> Tensor:
    x = n.norm(n.conv(x))
    x.mul_(2)
    return x


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 6, 1, groups=3)),
        nn.Sequential(timm.layers.StdConv2d(3, 5, 1)),
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 5, 1), timm.layers.BatchNormAct2d(5)),
        Steps(lambda n, x: n.conv(n.conv(x)), conv=nn.Conv2d(3, 3, 1)),
        Steps(lambda n, x: n.norm(n.conv(n.norm(x))), conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)),
        Steps(lambda n, x: x + n.conv(x), conv=nn.Conv2d(3, 3, 1)),
        Steps(lambda n, x: n.conv(x).add_(1), conv=nn.Conv2d(3, 5, 1)),
        Steps(written, conv=nn.Conv2d(3, 5, 1), norm=nn.Identity()),
        Steps(written, conv=nn.Conv2d(3, 5, 1), norm=nn.BatchNorm2d(5)),
        hooked(nn.Conv2d(3, 5, 1)),
        nn.Sequential(hooked_before(nn.Conv2d(3, 5, 1)), nn.BatchNorm2d(5)),
        nn.Sequential(nn.Conv2d(3, 5, 1), hooked_before(nn.BatchNorm2d(5))),
        nn.Sequential(nn.Conv2d(3, 5, 1), hooked(nn.Identity())),
    ],
    ids=[
        *("activation", "pooling", "grouped", "standardised", "batch statistics", "norm with activation", "used twice"),
        *("norm used twice", "shortcut", "written", "written behind an identity", "written behind a norm"),
        *("hook", "hook before", "hook of a norm", "hook of an identity"),
    ],
)
def test_producers_that_would_not_be_exact(module: nn.Module) -> None:
    if any(isinstance(part, nn.BatchNorm2d) and part.running_mean is None for part in module.modules()):
        before = fx.symbolic_trace(nn.Sequential(module).eval())
    else:
        before = traced(module)
    assert producer_layers(before) is None
    with pytest.raises(CutError, match="does not end in a dense layer"):
        fold_into_producer(before, filled(stitch_spec(SENDS, RECEIVES, bias=True)))


def test_a_convolution_that_pads_on_the_fly_takes_no_stitch() -> None:
    same = timm.layers.Conv2dSame(6, 4, 3, stride=2)
    graph = CutGraph(nn.Sequential(nn.Conv2d(3, 6, 1), same, nn.Conv2d(4, 4, 1)), (3, 8, 8))
    assert same.padding == (0, 0)
    assert consumer_layers(graph.fragment("0", None), bias=True) is None
    assert producer_layers(graph.fragment(None, "1")) is None


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("sender_width", "receiver_width"), [(4, 32), (32, 4), (8, 8)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_placement_is_the_exact_one_of_fewest_macs(
    kernel: int, sender_width: int, receiver_width: int, prefix: int, taken: bool
) -> None:
    before = traced(nn.Sequential(nn.Conv2d(3, sender_width, kernel, padding=kernel // 2)))
    after = traced(nn.Sequential(nn.Linear(receiver_width, 16), nn.ReLU()))
    spec = stitch_spec(cut("NCHW", sender_width, 8), cut("tokens", receiver_width, 4, prefix=prefix), bias=True)
    allowed = [p for p in exact_placements(before, spec, after) if not (taken and p == "producer")]
    macs = {p: network_cost(joined(before, filled(spec), after, p), (3, 8, 8)).macs for p in allowed}
    leaving = Leaving.of(before, spec.in_channels, spec.in_size, spec.in_prefix_tokens)
    entering = Entering.of(after, spec.out_channels, spec.out_size, spec.out_prefix_tokens, bias=True)
    receivers = Entering.stack([entering] * 2)
    places, _, _ = cheapest_places(leaving, receivers, bias=True, before_taken=taken)
    assert [macs[PLACES[place]] for place in places] == [min(macs.values())] * 2
    assert ("consumer" in macs) is (prefix == 0)


def test_folded_layers_stay_frozen() -> None:
    before, after = traced(nn.Sequential(nn.Conv2d(3, 5, 1))), traced(nn.Sequential(nn.Conv2d(6, 4, 1)))
    network = joined(before.requires_grad_(False), filled(stitch_spec(SENDS, RECEIVES, bias=True)), after, "producer")
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, False, True, True]
