"""Readouts as blocks of features that count alike: standardised, scaled, and their Gram matrices, in portions.

A block is one part of a readout, as the means of one activation over its positions. Each of its features is
standardised over the rows and divided by the root of the block's width, so that blocks count alike however wide they
are: z = (x - mean) factor. A feature that does not vary, or only by float32 rounding, has factor 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.maths.rows import THICK, check_rows, portions, varies

_ALL = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What makes z = (x - mean) factor of raw features x; mean and factor are (features,), float64."""

    mean: Tensor
    factor: Tensor

    def __call__(self, features: Tensor, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
        """Some rows and columns of z, float64."""
        return (features[rows, columns].double() - self.mean[columns]).mul_(self.factor[columns])


def check_blocks(blocks: Sequence[int], width: int) -> None:
    """Refuse widths of blocks that are below 1 or do not sum to the features' number."""
    if not blocks or min(blocks) < 1 or sum(blocks) != width:
        needed = f"blocks= must be widths of at least 1 that sum to the {width} features"
        raise StitchError(f"{needed}; found {list(blocks)}, which sum to {sum(blocks)}.")


def scale_of(features: Tensor, blocks: Sequence[int] | None) -> Scaling:
    """The scaling of features (rows x features) in blocks of such widths; None: they are only centred.

    Raises:
        StitchError: If the blocks' widths do not fit the features.
    """
    n, width = features.shape
    mean = sum_of_rows(features) / n
    if blocks is None:
        return Scaling(mean, torch.ones_like(mean))
    check_blocks(blocks, width)
    variance = torch.zeros_like(mean)
    for part in portions(n, width):
        variance += (features[part].double() - mean).square_().sum(0)
    return Scaling(mean, block_factors(mean, variance / n, blocks))


def block_factors(mean: Tensor, variance: Tensor, blocks: Sequence[int]) -> Tensor:
    """1 / sqrt(variance * width of the feature's block); 0 where it does not vary."""
    widths = torch.tensor(blocks, device=mean.device)
    scales = (variance * widths.repeat_interleave(widths)).rsqrt()
    return torch.where(varies(variance, mean), scales, torch.zeros_like(scales))


def sum_of_rows(features: Tensor) -> Tensor:
    """The features' sums over rows, float64, in portions."""
    parts = portions(*features.shape)
    return torch.stack([features[part].sum(0, dtype=torch.float64) for part in parts]).sum(0)


@torch.no_grad()
def block_gram(block: Tensor) -> Tensor:
    """Gram matrix of one block (rows x width): K = Z Z' / width of its features standardised over the rows, float64.

    Where every feature varies, the mean of the rows' squared norms is 1. Sums of such matrices are those of blocks side
    by side (`loo_ridge_of_gram`). A feature that varies by no more than float32 rounding counts as 0. Beyond the result
    (rows x rows) it takes one portion of columns, 256 or 2 MiB.

    Raises:
        CalibrationError: If the block is not 2-D, is empty, or has NaN or infinite values.

    Example:
        >>> gram = block_gram(torch.tensor([[1.0, 5.0, 7.0], [3.0, 1.0, 7.0]]))
        >>> [[round(value, 4) for value in row] for row in gram.tolist()]
        [[0.6667, -0.6667], [-0.6667, 0.6667]]
    """
    check_rows(block, "the block")
    return gram_of_rows(block, scale_of(block, [block.shape[1]]))


def gram_of_rows(features: Tensor, scaling: Scaling) -> Tensor:
    """Z Z' (rows x rows, float64), summed over portions of columns."""
    n, width = features.shape
    gram = scaling.mean.new_zeros(n, n)
    for part in portions(width, n, fewest=THICK):
        _add_lower(gram, scaling(features, columns=part))
    return _mirrored(gram)


def centre_gram(gram: Tensor) -> Tensor:
    """The Gram matrix of the rows less their mean, float64."""
    gram = gram.double()
    means = gram.mean(0)
    return gram - means - means[:, None] + means.mean()


def gram_of_features(features: Tensor, scaling: Scaling) -> Tensor:
    """Z' Z (features x features, float64), summed over portions of rows."""
    n, width = features.shape
    gram = scaling.mean.new_zeros(width, width)
    for part in portions(n, width, fewest=THICK):
        _add_lower(gram, scaling(features, part).T)
    return _mirrored(gram)


def _add_lower(gram: Tensor, z: Tensor) -> None:
    """Add the lower triangle of z z' in place, in eight strips: a little over half the work of the whole."""
    step = max(64, -(-len(z) // 8))
    for start in range(0, len(z), step):
        end = min(start + step, len(z))
        gram[start:end, :end].addmm_(z[start:end], z[:end].T)


def _mirrored(gram: Tensor) -> Tensor:
    """The lower triangle on both sides, in place: a Gram matrix, symmetric to the last bit."""
    for start in range(0, len(gram), THICK):
        end = start + THICK
        square = gram[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
        gram[start:end, end:] = gram[end:, start:end].T
    return gram
