"""Fit one stitch on what a running network sends and what the receiver was given in its own source."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths import AffineMap, r2, ridge_least_squares
from lightning_stitch.recipe import Fit, StitchSpec
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import images as held_out
from lightning_stitch.stitching.activations import CutStatistics, rows_to_fit
from lightning_stitch.stitching.stitches import Stitch


def fit_stitch(
    spec: StitchSpec,
    activation: Iterable[Tensor],
    sender: Cut,
    receiver: CutStatistics,
    settings: CalibrationSettings,
    *,
    num_images: int,
    num_held_out: int,
    ridge: float | Sequence[float],
    open_loop: Iterable[Tensor] | None = None,
    weighted: bool = False,
    refit: bool = True,
) -> Stitch | None:
    """An explicit stitch; its spec says how well it explains held-out images. None where the activation is not finite.

    Args:
        spec: The stitch's structure.
        activation: What the running network sends of all calibration images, portion by portion.
        sender: The cut that it leaves.
        receiver: What the receiver was given in its own source.
        settings: How rows are sampled; the receiver's.
        num_images: Number of calibration images.
        num_held_out: How many of them, the last ones, judge the fit.
        ridge: Strength of the fit, or several to choose from (`fit_rows`).
        open_loop: What the sender's own source sends, where that may be fitted instead.
        weighted: Whether to try weights (`fit_rows`).
        refit: Whether the held-out images are fitted, too, in the end.
    """
    prefix_tokens = spec.in_prefix_tokens if spec.carries_prefix else 0
    rows_of = partial(
        rows_to_fit, sender=sender, grid=receiver.cut.grid, prefix_tokens=prefix_tokens, settings=settings
    )
    rows = rows_of(activation)
    if rows is None:
        return None
    affine, held_out, fit = fit_rows(
        rows,
        receiver.all_rows if prefix_tokens else receiver.rows,
        num_images=num_images,
        num_held_out=num_held_out,
        ridge=ridge,
        bias=spec.bias,
        open_loop=None if open_loop is None else rows_of(open_loop),
        weighted=weighted,
        refit=refit,
    )
    spec = dataclasses.replace(spec, r2=held_out, rank=affine.rank, condition=affine.condition, fit=fit)
    return fitted_stitch(spec, affine, prefix=receiver.prefix)


def fit_rows(
    x: Tensor,
    y: Tensor,
    *,
    num_images: int,
    ridge: float | Sequence[float],
    bias: bool,
    num_held_out: int | None = None,
    open_loop: Tensor | None = None,
    weighted: bool = False,
    refit: bool = True,
) -> tuple[AffineMap, float | None, Fit]:
    """The map fitted on all rows, its R2 on held-out images when fitted on the others, and which fit it is.

    That is least squares over the rows that the running network sends ("closed_loop"), unless another fit or strength
    explains more of what it sends on the held-out images.

    Args:
        x: The sender's rows x channels, image by image, as the running network sends them.
        y: The receiver's, likewise.
        num_images: Number of images.
        ridge: Strength of the fit, relative to the mean variance of the sender's channels; or several to choose from,
            of which the first is taken where nothing can be held out.
        bias: Whether the map has a bias.
        num_held_out: How many of the images, the last ones, are held out; None: a quarter.
        open_loop: The same rows as the sender's source sends them where nothing is stitched before; None: no such fit.
        weighted: Whether to try weights, too: rows far from the receiver's mean count less, inversely to their squared
            distance plus the mean squared distance.
        refit: Whether the map is fitted on the held-out images, too, in the end.
    """
    fits: dict[Fit, tuple[Tensor, Tensor | None]] = {"closed_loop": (x, None)}
    if open_loop is not None:
        fits["open_loop"] = (open_loop, None)
    if weighted:
        far = (y.double() - y.double().mean(0)).square().sum(1)
        fits["row_weights"] = (x, far.mean() / (far + far.mean()).clamp(min=1e-300))
    num_held_out = held_out.num_held_out(num_images) if num_held_out is None else num_held_out
    split = (num_images - num_held_out) * (len(x) // num_images)
    ridges = [ridge] if isinstance(ridge, int | float) else list(ridge)
    best: tuple[Fit, float] = ("closed_loop", ridges[0])
    explained: dict[tuple[Fit, float], float] = {}
    if split not in (0, len(x)):
        for name, strength in itertools.product(fits, ridges):
            rows, weights = fits[name]
            part = None if weights is None else weights[:split]
            predict = _weighted_fit(rows[:split], y[:split], part, ridge=strength, bias=bias, diagnose=False)
            try:
                explained[name, strength] = r2(predict(x[split:].double()), y[split:])
            except CalibrationError:
                # The receiver does not vary on the held-out images, so there is no share of variance to speak of.
                break
        best = max(explained, key=explained.__getitem__, default=best)
    fit, strength = best
    rows, weights = fits[fit]
    if not refit:
        rows, y, weights = rows[:split], y[:split], None if weights is None else weights[:split]
    return _weighted_fit(rows, y, weights, ridge=strength, bias=bias), explained.get(best), fit


def _weighted_fit(
    x: Tensor, y: Tensor, weights: Tensor | None, *, ridge: float, bias: bool, diagnose: bool = True
) -> AffineMap:
    """`ridge_least_squares` of weighted rows."""
    if weights is None:
        return ridge_least_squares(x, y, ridge=ridge, bias=bias, diagnose=diagnose)
    x, y, weights = x.double(), y.double(), weights / weights.mean()
    mean_x, mean_y = (weights @ x / len(x), weights @ y / len(x)) if bias else (x.new_zeros(1), y.new_zeros(1))
    roots = weights.sqrt()[:, None]
    fit = ridge_least_squares(roots * (x - mean_x), roots * (y - mean_y), ridge=ridge, bias=False, diagnose=diagnose)
    return dataclasses.replace(fit, bias=mean_y - fit.weight @ mean_x if bias else None)


def fitted_stitch(spec: StitchSpec, affine: AffineMap, *, prefix: Tensor | None = None) -> Stitch:
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
