"""Fit one stitch on what a running network sends and what the receiver was given in its own source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from lightning_stitch.activations import CutStatistics, rows_to_fit
from lightning_stitch.cutting.graph import Cut
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitches import Stitch, fit_rows, fitted_stitch


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
