"""Fit one stitch on what a running network sends and what the receiver was given in its own source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths import AffineMap, r2, ridge_least_squares
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import images as held_out
from lightning_stitch.stitching.activations import Calibrated, rows_to_fit
from lightning_stitch.stitching.stitches import Stitch


def fit_stitch(
    spec: StitchSpec,
    activation: Iterable[Tensor],
    sender: Cut,
    receiver: Calibrated,
    settings: CalibrationSettings,
    *,
    entry: int,
    ridge: float | Sequence[float],
    refit: bool = True,
) -> Stitch | None:
    """An explicit stitch; its spec says how well it explains held-out images. None where the activation is not finite.

    `activation` is what the running network sends of all calibration images, portion by portion, from the cut
    `sender`; `entry` is the receiver's first piece that runs. `ridge` and `refit` are those of `fit_rows`.
    """
    statistics = receiver.statistics[entry - 1]
    rows = rows_to_fit(spec, activation, sender, statistics, settings)
    if rows is None:
        return None
    affine, explained = fit_rows(
        *rows,
        num_images=len(receiver.features),
        num_held_out=receiver.num_held_out,
        ridge=ridge,
        bias=spec.bias,
        refit=refit,
    )
    spec = dataclasses.replace(spec, r2=explained, rank=affine.rank, condition=affine.condition)
    return stitch_from_fit(spec, affine, prefix=statistics.prefix)


def fit_rows(
    x: Tensor,
    y: Tensor,
    *,
    num_images: int,
    ridge: float | Sequence[float],
    bias: bool,
    num_held_out: int | None = None,
    refit: bool = True,
) -> tuple[AffineMap, float | None]:
    """The least-squares map fitted on all rows, and its R2 on held-out images when fitted on the others.

    The sender's `x` and the receiver's `y` are rows x channels, image by image. The last `num_held_out` images are held
    out (None: a quarter), and fitted, too, in the end if `refit`. Of several strengths `ridge`, relative to the mean
    variance of the sender's channels, the one that explains most of the held-out images is taken; the first where
    nothing can be held out.
    """
    num_held_out = held_out.num_held_out(num_images) if num_held_out is None else num_held_out
    split = (num_images - num_held_out) * (len(x) // num_images)
    ridges = [ridge] if isinstance(ridge, int | float) else list(ridge)
    explained: dict[float, float] = {}
    if split not in (0, len(x)):
        for strength in ridges:
            predict = ridge_least_squares(x[:split], y[:split], ridge=strength, bias=bias, diagnose=False)
            try:
                explained[strength] = r2(predict(x[split:].double()), y[split:])
            except CalibrationError:
                # The receiver does not vary on the held-out images, so there is no share of variance to speak of.
                break
    best = max(explained, key=explained.__getitem__, default=ridges[0])
    if not refit:
        x, y = x[:split], y[:split]
    return ridge_least_squares(x, y, ridge=best, bias=bias), explained.get(best)


def stitch_from_fit(spec: StitchSpec, affine: AffineMap, *, prefix: Tensor | None = None) -> Stitch:
    """An explicit stitch with the numbers of a fit; a placement in the spec is set aside until the fold."""
    stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
    with torch.no_grad():
        assert stitch.weight is not None
        stitch.weight.copy_(affine.weight)
        if stitch.bias is not None and affine.bias is not None:
            stitch.bias.copy_(affine.bias)
        if stitch.prefix is not None and prefix is not None:
            stitch.prefix.copy_(prefix)
    return stitch.to(affine.weight.device)
