"""Stitches: bridge the format, resample to the receiver's grid, apply an affine map.

The map is fitted by centred ridge least squares on the same rows that CKA is scored on, so that what is scored is what
runs. (The StitchNet paper's A = Y' pinv(X') is `bias=False, ridge=0`.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_stitch.cutting import Cut
from lightning_stitch.recipe import Placement, StitchSpec


def resample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample a map (batch, channels, height, width): anti-aliased where it shrinks, bilinear where it grows."""
    if tuple(x.shape[-2:]) == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def to_map(x: Tensor, cut: Cut) -> Tensor:
    """A cut's activation as (batch, channels, height, width), prefix tokens dropped; a vector as (batch, channels)."""
    return _to_map(x, cut.format, cut.num_prefix_tokens, cut.grid)


def _to_map(x: Tensor, format: str, num_prefix_tokens: int, grid: tuple[int, int] | None) -> Tensor:
    if format == "NHWC":
        return x.permute(0, 3, 1, 2)
    if format == "tokens":
        x = x[:, num_prefix_tokens:]
        assert grid is not None
        # At another image size than the calibration's there are more tokens or fewer, in the same proportions.
        height = round(math.sqrt(x.shape[1] * grid[0] / grid[1]))
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, x.shape[1] // height)
    return x


def is_bridgeable(sender: Cut, receiver: Cut) -> bool:
    """Whether a stitch can lead from one cut to another: anything but a vector to a grid."""
    return sender.format != "vector" or receiver.format == "vector"


class Stitch(nn.Module):
    """What joins one fragment's output to the next one's input.

    Takes the sender's tensor, gives one of the receiver's shape. At another image size than the calibration's the
    target grid scales with the sender's. A folded stitch has no parameters of its own.
    """

    traced_whole = True
    prefix: Tensor | None

    def __init__(self, spec: StitchSpec) -> None:
        super().__init__()
        self.spec = spec
        explicit = spec.placement == "explicit"
        self.weight = nn.Parameter(torch.zeros(spec.out_channels, spec.in_channels)) if explicit else None
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if explicit and spec.bias else None
        supplied = 0 if spec.carries_prefix else spec.out_prefix_tokens
        self.register_buffer("prefix", torch.zeros(supplied, spec.out_channels) if supplied else None)

    def forward(self, x: Tensor) -> Tensor:
        """The receiver's input from the sender's output."""
        spec = self.spec
        prefix = None if self.prefix is None else self.prefix.to(x.dtype).expand(x.shape[0], -1, -1)
        if spec.carries_prefix:
            prefix = x[:, : spec.in_prefix_tokens]
            prefix = prefix if self.weight is None else functional.linear(prefix, self.weight, self.bias)
        x = _to_map(x, spec.in_format, spec.in_prefix_tokens, spec.in_size)
        if spec.out_size is None:
            return self._affine(x.mean((2, 3)) if x.ndim == 4 else x)
        size = self._target_size(x)
        if size[0] * size[1] > x.shape[-2] * x.shape[-1]:
            # Both are linear and resampling weights sum to one, so they commute; the smaller grid costs less.
            x = resample(self._affine(x), size)
        else:
            x = self._affine(resample(x, size))
        if spec.out_format == "NHWC":
            return x.permute(0, 2, 3, 1)
        if spec.out_format == "tokens":
            x = x.flatten(2).transpose(1, 2)
            if prefix is not None:
                x = torch.cat([prefix, x], dim=1)
        return x

    def extra_repr(self) -> str:
        """One line for print(network)."""
        spec = self.spec
        return (
            f"{spec.in_format} {spec.in_channels}x{spec.in_size} -> "
            f"{spec.out_format} {spec.out_channels}x{spec.out_size}, {spec.placement}"
        )

    def _affine(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        if x.ndim == 2:
            return functional.linear(x, self.weight, self.bias)
        return functional.conv2d(x, self.weight[:, :, None, None], self.bias)

    def _target_size(self, x: Tensor) -> tuple[int, int]:
        calibrated, target = self.spec.in_size, self.spec.out_size
        assert calibrated is not None
        assert target is not None
        height = round(target[0] * x.shape[-2] / calibrated[0])
        width = round(target[1] * x.shape[-1] / calibrated[1])
        return max(height, 1), max(width, 1)


def stitch_spec(sender: Cut, receiver: Cut, *, bias: bool, placement: Placement = "explicit") -> StitchSpec:
    """The structure of a stitch from one cut to another."""
    return StitchSpec(
        in_format=sender.format,
        out_format=receiver.format,
        in_channels=sender.channels,
        out_channels=receiver.channels,
        in_size=sender.grid,
        out_size=receiver.grid,
        in_prefix_tokens=sender.num_prefix_tokens,
        out_prefix_tokens=receiver.num_prefix_tokens,
        bias=bias,
        placement=placement,
    )
