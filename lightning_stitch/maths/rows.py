"""Rows of activations: checked, paired and centred."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError

NOISE = 4 * torch.finfo(torch.float32).eps  # a column whose deviations are a smaller share of its mean is constant


def rows(x: Tensor, name: str) -> Tensor:
    """The rows in float64, once they are known to be 2-D and finite; errors call them `name`."""
    all_finite(x, name)
    return x.double()


def all_finite(x: Tensor, name: str) -> None:
    """Refuse rows that are not 2-D or not finite."""
    if x.ndim != 2 or 0 in x.shape:
        needed = "must be rows x channels, 2-D and not empty (flatten maps and tokens first); found shape"
        raise CalibrationError(f"{name} {needed} {tuple(x.shape)}.")
    if not x.sum(dtype=torch.float64).isfinite() and (num_bad := int((~x.isfinite().all(1)).sum())):
        cause = "Look for overflow (half precision?) or broken images or weights before this point."
        raise CalibrationError(f"{name} has NaN or infinite values in {num_bad} of its {len(x)} rows. {cause}")


def paired(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Both in float64, once they are known to have as many rows."""
    if x.ndim == y.ndim == 2 and len(x) != len(y):
        shapes = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        raise CalibrationError(f"{' and '.join(names)} must have the same number of rows; found {shapes}.")
    return rows(x, names[0]), rows(y, names[1])


def centred(x: Tensor, name: str) -> Tensor:
    """The rows less their mean, once they are known to vary."""
    mean = x.mean(0)
    x = x - mean
    check_varies(x.square().mean(0), mean, len(x), name)
    return x


def check_varies(variance: Tensor, mean: Tensor, n: int, name: str) -> None:
    """Refuse an activation whose every channel is constant up to rounding."""
    if bool((variance <= (NOISE * mean).square()).all()):
        found = f"its {n} rows of {len(mean)} channels are equal up to rounding"
        raise CalibrationError(f"{name} is constant: {found}. Look for a dead layer or identical images.")
