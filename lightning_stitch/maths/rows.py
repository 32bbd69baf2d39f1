"""Rows of activations: checked, paired and centred."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError

_NOISE = 4 * torch.finfo(torch.float32).eps  # a column whose deviations are a smaller share of its mean is constant
_PORTION = 2**18  # numbers that are made float64 at once: 2 MiB, which stay in a core's cache
THICK = 256
"""Fewest rows or columns in a portion of a product with a large matrix, for it to be worth the pass over it."""


def check_rows(x: Tensor, name: str) -> None:
    """Refuse what is not 2-D or not finite, without a copy of it in float64; errors call it `name`."""
    if x.ndim != 2 or 0 in x.shape:
        needed = "must be rows x channels, 2-D and not empty (flatten maps and tokens first); found shape"
        raise CalibrationError(f"{name} {needed} {tuple(x.shape)}.")
    parts = [x[part] for part in portions(*x.shape)]
    # Finite numbers have a finite sum, which is quicker to see.
    suspects = [part for part in parts if not part.sum(dtype=torch.float64).isfinite()]
    if num_bad := sum(int((~part.isfinite().all(1)).sum()) for part in suspects):
        cause = "Look for overflow (half precision?) or broken images or weights before this point."
        raise CalibrationError(f"{name} has NaN or infinite values in {num_bad} of its {len(x)} rows. {cause}")


def check_pair(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
    """Refuse rows that are not of the same number, and as `check_rows`."""
    if x.ndim == y.ndim == 2 and len(x) != len(y):
        shapes = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        raise CalibrationError(f"{' and '.join(names)} must have the same number of rows; found {shapes}.")
    check_rows(x, names[0])
    check_rows(y, names[1])


def portions(length: int, width: int, *, fewest: int = 1) -> Iterator[slice]:
    """Slices of a length whose entries hold `width` numbers each: 2 MiB of them in float64, or the `fewest` entries."""
    step = max(fewest, _PORTION // width)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def rows(x: Tensor, name: str) -> Tensor:
    """The rows in float64, once they are known to be 2-D and finite; errors call them `name`."""
    check_rows(x, name)
    return x.double()


def paired(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Both in float64, once they are known to have as many rows."""
    check_pair(x, y, names)
    return x.double(), y.double()


def varies(variance: Tensor, mean: Tensor) -> Tensor:
    """Which columns vary by more than float32 rounds."""
    return variance > (_NOISE * mean).square()


def centred(x: Tensor, name: str) -> Tensor:
    """The rows less their mean, once they are known to vary."""
    mean = x.mean(0)
    x = x - mean
    check_varies(x.square().mean(0), mean, len(x), name)
    return x


def check_varies(variance: Tensor, mean: Tensor, n: int, name: str) -> None:
    """Refuse an activation whose every channel is constant up to rounding."""
    if not bool(varies(variance, mean).any()):
        found = f"its {n} rows of {len(mean)} channels are equal up to rounding"
        raise CalibrationError(f"{name} is constant: {found}. Look for a dead layer or identical images.")
