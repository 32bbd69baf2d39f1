from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from doubles.small_sources import donor
from doubles.tensors import noise, seeded
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.cutting.graph import Cut
from lightning_stitch.maths.regression import AffineMap, r2, ridge_least_squares
from lightning_stitch.recipe import Format, StitchSpec
from lightning_stitch.stitching.fitting import fit_rows, stitch_from_fit
from lightning_stitch.stitching.stitches import Stitch, is_bridgeable, resample, stitch_spec, to_map

FORMATS: list[Format] = ["NCHW", "NHWC", "tokens", "vector"]

shaken = cache(donor)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def cut(format: Format, channels: int, side: int, prefix: int = 0) -> Cut:
    shape = {
        "NCHW": (channels, side, side),
        "NHWC": (side, side, channels),
        "tokens": (prefix + side * side, channels),
        "vector": (channels,),
    }[format]
    grid, stride = (None, None) if format == "vector" else ((side, side), 32 / side)
    return Cut("cut", format, shape, grid, stride, prefix, 0)


def affine(inputs: int, outputs: int, *, bias: bool = True, seed: int = 0) -> AffineMap:
    weight = torch.randn(outputs, inputs, generator=seeded(seed), dtype=torch.float64)
    shift = torch.randn(outputs, generator=seeded(seed + 1), dtype=torch.float64) if bias else None
    return AffineMap(weight, shift, rank=inputs, condition=1.0, ridge=0.0)


def as_map(x: Tensor, at: Cut) -> Tensor:
    """(batch, channels, height, width) of a cut's activation, spelled out; of a vector (batch, channels)."""
    if at.format == "NHWC":
        return torch.stack(x.unbind(3), 1)
    if at.format == "tokens":
        assert at.grid
        return torch.stack([image[at.num_prefix_tokens :].T.reshape(-1, *at.grid) for image in x])
    return x


def expected(x: Tensor, sender: Cut, receiver: Cut, numbers: AffineMap) -> Tensor:
    """The stitch's definition, affine map first, in float64; without prefix tokens, as a map."""
    y = as_map(x.double(), sender)
    y = torch.einsum("oi,bi...->bo...", numbers.weight, y)
    if numbers.bias is not None:
        y = y + numbers.bias.view(-1, *[1] * (y.ndim - 2))
    if receiver.grid is None:
        return y.mean((2, 3)) if y.ndim == 4 else y
    return F.interpolate(y, size=receiver.grid, mode="bilinear", antialias=True) if y.shape[-2:] != receiver.grid else y


# -- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "new"), [((12, 12), (5, 5)), ((16, 12), (8, 6)), ((7, 9), (3, 9)), ((10, 10), (1, 1))]
)
def test_shrinking_is_anti_aliased_as_pillow_does_it(size: tuple[int, int], new: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    planes = [Image.fromarray(plane.numpy()).resize(new[::-1], Image.Resampling.BILINEAR) for plane in x.flatten(0, 1)]
    reference = torch.tensor(np.stack([np.asarray(plane) for plane in planes])).view(2, 3, *new)
    assert torch.allclose(resample(x, new), reference, atol=1e-6)


@pytest.mark.parametrize("new", [(14, 14), (13, 9), (8, 7)])
def test_growing_is_bilinear(new: tuple[int, int]) -> None:
    x = noise(2, 3, 7, 7)
    assert torch.allclose(resample(x, new), F.interpolate(x, size=new, mode="bilinear", align_corners=False), atol=1e-6)


def test_resampling_keeps_a_constant_and_a_map_of_the_right_size() -> None:
    x = noise(2, 3, 6, 6)
    assert torch.equal(resample(x, (6, 6)), x)
    for new in [(4, 4), (9, 9), (4, 9)]:
        assert torch.allclose(resample(torch.full((1, 2, 6, 6), 0.7), new), torch.tensor(0.7))


# -- the stitch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(6, 6), (8, 3), (3, 8)], ids=["same grid", "shrink", "grow"])
@pytest.mark.parametrize("receiver_format", FORMATS)
@pytest.mark.parametrize("sender_format", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stitch_bridges_resamples_and_maps(
    sender_format: Format, receiver_format: Format, sides: tuple[int, int], bias: bool
) -> None:
    sender = cut(sender_format, 5, sides[0], prefix=2 if sender_format == "tokens" else 0)
    receiver = cut(receiver_format, 7, sides[1], prefix=1 if receiver_format == "tokens" else 0)
    numbers, prefix, x = affine(5, 7, bias=bias), noise(1, 7, seed=5), noise(3, *sender.shape, seed=4)
    stitch = stitch_from_fit(stitch_spec(sender, receiver, bias=bias), numbers, prefix=prefix)
    result = stitch(x)
    assert result.shape == (3, *receiver.shape)
    assert torch.allclose(as_map(result, receiver).double(), expected(x, sender, receiver, numbers), atol=1e-5)
    if receiver_format == "tokens":
        assert torch.equal(result[:, :1], prefix.expand(3, 1, 7))


@pytest.mark.parametrize("bias", [True, False])
def test_vector_to_vector_is_the_affine_map(bias: bool) -> None:
    numbers, x = affine(5, 7, bias=bias), noise(3, 5)
    stitch = stitch_from_fit(stitch_spec(cut("vector", 5, 1), cut("vector", 7, 1), bias=bias), numbers)
    shift = 0 if numbers.bias is None else numbers.bias
    assert torch.allclose(stitch(x).double(), x.double() @ numbers.weight.T + shift, atol=1e-5)


@pytest.mark.parametrize("sides", [(9, 4), (4, 9), (6, 6)])
def test_mapping_before_and_after_resampling_is_the_same(sides: tuple[int, int]) -> None:
    sender, receiver, numbers = cut("NCHW", 5, sides[0]), cut("NCHW", 7, sides[1]), affine(5, 7)
    x = noise(2, *sender.shape)
    stitch = stitch_from_fit(stitch_spec(sender, receiver, bias=True), numbers)
    assert numbers.bias is not None
    weight, shift = numbers.weight[:, :, None, None].float(), numbers.bias.float()
    before = resample(F.conv2d(x, weight, shift), (sides[1], sides[1]))
    after = F.conv2d(resample(x, (sides[1], sides[1])), weight, shift)
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(stitch(x), before, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (4, 4), (8, 12), (1, 1)])
@pytest.mark.parametrize("sides", [(8, 4), (4, 8), (8, 8)])
def test_at_another_image_size_the_target_grid_scales_with_the_senders(
    sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    stitch = stitch_from_fit(stitch_spec(cut("NCHW", 5, sides[0]), cut("NCHW", 7, sides[1]), bias=True), affine(5, 7))
    size = [max(1, round(side * sides[1] / sides[0])) for side in shape]
    assert stitch(noise(2, 5, *shape)).shape == (2, 7, *size)


def test_tokens_of_another_image_size_are_taken_as_a_square() -> None:
    numbers = affine(5, 7)
    stitch = stitch_from_fit(stitch_spec(cut("tokens", 5, 4, prefix=1), cut("NCHW", 7, 2), bias=True), numbers)
    x, larger = noise(2, 1 + 64, 5), cut("tokens", 5, 8, prefix=1)
    assert torch.allclose(stitch(x).double(), expected(x, larger, cut("NCHW", 7, 4), numbers), atol=1e-5)


def test_a_folded_stitch_only_bridges_and_resamples() -> None:
    sender, receiver, x = cut("NHWC", 5, 8), cut("tokens", 5, 4), noise(2, 8, 8, 5)
    for placement in ("producer", "consumer"):
        stitch = Stitch(stitch_spec(sender, receiver, bias=True, placement=placement))
        assert stitch.state_dict() == {}
        assert torch.equal(as_map(stitch(x), receiver), resample(x.permute(0, 3, 1, 2), (4, 4)))


def test_a_fit_makes_an_explicit_stitch_whatever_the_placement() -> None:
    spec = stitch_spec(cut("NCHW", 5, 4), cut("NCHW", 7, 4), bias=True, placement="consumer")
    stitch, numbers = stitch_from_fit(spec, affine(5, 7)), affine(5, 7)
    assert stitch.spec == dataclasses.replace(spec, placement="explicit")
    assert numbers.bias is not None
    assert torch.equal(stitch.state_dict()["weight"], numbers.weight.float())
    assert torch.equal(stitch.state_dict()["bias"], numbers.bias.float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("channels", [5, 40])  # fewer and more than the rows of the fit
def test_the_held_out_r2_is_that_of_the_map_fitted_on_the_other_images(channels: int, ridge: float, bias: bool) -> None:
    x, noisy = noise(32, channels).double(), noise(32, 3, seed=1).double()
    y = x[:, :3] + noisy + 2
    _, held_out = fit_rows(x, y, num_images=8, ridge=ridge, bias=bias)
    fit = ridge_least_squares(x[:24], y[:24], ridge=ridge, bias=bias)
    predicted = x[24:] @ fit.weight.T + (0 if fit.bias is None else fit.bias)
    assert held_out == pytest.approx(r2(predicted, y[24:]), abs=1e-9)


def test_of_several_strengths_the_one_that_explains_most_on_held_out_images_is_fitted() -> None:
    x = noise(32, 40).double()
    y = x[:, :3] + 2 * noise(32, 3, seed=1).double()
    strengths = [1e-3, 1e-1, 10.0, 1e3]
    alone = [fit_rows(x, y, num_images=8, ridge=one, bias=True) for one in strengths]
    fit, held_out = fit_rows(x, y, num_images=8, ridge=strengths, bias=True)
    best = max(alone, key=lambda found: found[1])
    assert held_out == best[1] > alone[0][1]
    assert fit.ridge == best[0].ridge
    assert torch.equal(fit.weight, best[0].weight)
    few, none = fit_rows(x[:12], y[:12], num_images=3, ridge=strengths, bias=True)
    assert none is None
    assert torch.equal(few.weight, fit_rows(x[:12], y[:12], num_images=3, ridge=1e-3, bias=True)[0].weight)


def test_a_receiver_that_is_an_affine_map_of_the_sender_is_met_exactly() -> None:
    sender, receiver = cut("tokens", 5, 8, prefix=1), cut("NCHW", 7, 4)
    x, numbers = noise(4, *sender.shape), affine(5, 7)
    y = expected(x, sender, receiver, numbers)
    rows = [part.transpose(0, 1).flatten(1).T for part in (resample(to_map(x, sender), (4, 4)), y)]
    stitch = stitch_from_fit(stitch_spec(sender, receiver, bias=True), ridge_least_squares(*rows, ridge=0))
    assert torch.allclose(stitch(x).double(), y, atol=1e-4)


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_activation_as_a_map(format: Format) -> None:
    at = cut(format, 5, 4, prefix=3 if format == "tokens" else 0)
    x = noise(2, *at.shape)
    assert torch.equal(to_map(x, at), as_map(x, at))


@pytest.mark.parametrize("receiver", FORMATS)
@pytest.mark.parametrize("sender", FORMATS)
def test_everything_but_a_vector_leads_to_a_grid(sender: Format, receiver: Format) -> None:
    leads_nowhere = (sender, receiver) in [("vector", "NCHW"), ("vector", "NHWC"), ("vector", "tokens")]
    assert is_bridgeable(cut(sender, 5, 4), cut(receiver, 7, 4)) is not leads_nowhere


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (("test_resnet", "layer2"), ("test_efficientnet", "blocks.2")),  # map -> map
        (("test_resnet", "layer1"), ("test_vit", "blocks.1")),  # map -> tokens with a class token
        (("test_vit", "blocks.3"), ("test_resnet", "layer3")),  # tokens -> map
        (("test_vit", "blocks.3"), ("test_vit2", "blocks.1")),  # tokens -> tokens
        (("test_maxvit", "stages.1.blocks.0.attn_grid"), ("test_resnet", "layer1")),  # NHWC -> NCHW
        (("test_resnet", "layer1"), ("test_maxvit", "stages.1.blocks.0.attn_grid")),  # NCHW -> NHWC
        (("test_vit", "blocks.3"), ("test_resnet", "global_pool")),  # tokens -> vector
        (("test_resnet", "global_pool"), ("test_vit", "fc_norm")),  # vector -> vector
    ],
)
def test_fragments_of_real_networks_run_behind_a_stitch(sender: tuple[str, str], receiver: tuple[str, str]) -> None:
    before, after = shaken(sender[0]), shaken(receiver[0])
    sends, receives = before.graph.find(sender[1]), after.graph.find(receiver[1])
    numbers = affine(sends.channels, receives.channels)
    stitch = stitch_from_fit(stitch_spec(sends, receives, bias=True), numbers)
    network = nn.Sequential(before.fragment(None, sends.name), stitch, after.fragment(receives.name, None))
    x = network[0](noise(3, 3, 160, 160))
    met = as_map(stitch(x), receives).double()
    assert torch.allclose(met, expected(x, sends, receives, numbers), rtol=1e-4, atol=1e-4 * float(met.abs().max()))
    assert network(noise(3, 3, 160, 160)).shape == (3, 1000)


def test_a_spec_holds_what_its_cuts_say() -> None:
    assert stitch_spec(cut("tokens", 5, 4, prefix=2), cut("NCHW", 7, 6), bias=False) == StitchSpec(
        in_format="tokens",
        out_format="NCHW",
        in_channels=5,
        out_channels=7,
        in_size=(4, 4),
        out_size=(6, 6),
        in_prefix_tokens=2,
        out_prefix_tokens=0,
        bias=False,
    )
