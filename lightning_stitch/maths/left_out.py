"""Leave-one-out ridge regression for many strengths at once, from features or from their Gram matrix.

With a free intercept, Z the centred features of n rows, ZZ' = U diag(s) U' and the penalty lambda, the fitted values
are H y for H = 11'/n + U diag(s / (s + lambda)) U', and the residual of a row that is left out is (y - Hy)_i /
(1 - h_ii), exactly (Allen 1974, PRESS). The constant direction 11'/n belongs in h_ii: without it strengths come out far
too small.

Features may come in blocks (what several taps read, side by side). Then each feature is divided by its standard
deviation and each block by the root of its width, so that all blocks weigh the same and ZZ' is the sum of the blocks'
own Gram matrices. What follows from these rows (means and deviations) stays when a row is left out.

Memory: float64 matrices of min(n, d)^2, of which an eigendecomposition holds some three, and portions of the features
of at most `PORTION` numbers; no copy of the features. Of n > d the sums run over rows, d x d, else over features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.regression import AffineMap
from lightning_stitch.maths.rows import NOISE, all_finite, paired

PORTION = 2**22
"""Numbers of the features that are in float64 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What makes Z of features: less the mean (d,), times the scale (d,), float64; what does not vary has scale 0."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, blocks: Sequence[int] | None) -> Scaling:
        """That of features (n x d) in blocks of these widths, or with None as they are, centred.

        Raises:
            StitchError: If widths are not positive, or are not the features' together.
        """
        mean = torch.cat([part.double().mean(0) for part in _by_columns(features)])
        if blocks is None:
            return cls(mean, torch.ones_like(mean))
        check_blocks(blocks, features.shape[1])
        variance = torch.cat([part.double().var(0, correction=0) for part in _by_columns(features)])
        widths = torch.tensor([float(width) for width in blocks for _ in range(width)], dtype=torch.float64)
        varies = variance > (NOISE * mean).square()
        return cls(mean, torch.where(varies, (variance * widths.to(mean)).rsqrt(), torch.zeros_like(mean)))

    def apply(self, features: Tensor, columns: slice = slice(None)) -> Tensor:
        """Z of some features, of all rows or a portion of them."""
        return (features[:, columns].double() - self.mean[columns]) * self.scale[columns]


@dataclass(frozen=True, slots=True, eq=False)
class LooRidge:
    """Ridge regression of rows on targets, ready for any strength; `scale` times it is the lambda.

    Attributes:
        strengths: Those that were asked for.
        squared_errors: Squared error of the rows when each is left out, summed over them (strengths x columns).
        scale: Mean eigenvalue of ZZ'.
    """

    strengths: tuple[float, ...]
    squared_errors: Tensor = field(init=False)
    scale: float
    _targets: Tensor
    _eigenvalues: Tensor
    _projected: Tensor  # U'(y - mean)
    _bases: Callable[[], Iterator[Tensor]]  # rows of U, in portions
    _weights: Callable[[Tensor], AffineMap] | None  # from U diag(1 / (s + lambda)) U'y in the basis of Z'

    def __post_init__(self) -> None:
        """Sum the errors for all strengths."""
        sums = self._targets.new_zeros(len(self.strengths), self._targets.shape[1])
        penalties = self.scale * self._targets.new_tensor(self.strengths)
        for residuals in self._residuals(penalties):
            sums += residuals.square().sum(1)
        object.__setattr__(self, "squared_errors", sums)

    @property
    def predictions(self) -> Tensor:
        """Each row as predicted from all others, for all strengths (strengths x n x columns), float64."""
        return torch.stack([self.left_out(strength) for strength in self.strengths])

    def left_out(self, strength: float) -> Tensor:
        """Each row as predicted from all others (n x columns), float64, with any strength."""
        check_strengths([strength])
        penalty = self._targets.new_tensor([strength * self.scale])
        return self._targets - torch.cat([residuals[0] for residuals in self._residuals(penalty)])

    def weights(self, strength: float) -> AffineMap:
        """The map fitted on all rows with one strength, from features as they came.

        Raises:
            StitchError: If the strength is not a positive finite number, or there are no features but a Gram matrix.
        """
        check_strengths([strength])
        if self._weights is None:
            raise StitchError("A Gram matrix gives predictions, no weights: those need the features.")
        return self._weights(self._projected / (self._eigenvalues + strength * self.scale)[:, None])

    def _residuals(self, penalties: Tensor) -> Iterator[Tensor]:
        """What is left of the targets when each row is left out (penalties x rows x columns), in portions of rows."""
        n, first = len(self._targets), 0
        centred = self._targets - self._targets.mean(0)
        # 1 - s / (s + lambda) is written lambda / (s + lambda), so that nothing cancels where the fit interpolates.
        shrinkage = penalties[:, None] / (self._eigenvalues + penalties[:, None])
        for u in self._bases():
            y = centred[first : first + len(u)]
            first += len(u)
            fitted = torch.einsum("nr,grk->gnk", u, shrinkage[:, :, None] * self._projected)
            slack = (1 - 1 / n - u.square().sum(1)).clamp_min(0) + shrinkage @ u.square().T
            yield (y - u @ self._projected + fitted) / slack[:, :, None]


def loo_ridge(
    features: Tensor, targets: Tensor, *, strengths: Sequence[float], blocks: Sequence[int] | None = None
) -> LooRidge:
    """Exact leave-one-out ridge regression (n x d to n x k), intercept free, from one decomposition.

    lambda = strength * trace(ZZ') / min(n - 1, d), relative to the mean eigenvalue.

    Args:
        features: Rows x features, any real dtype.
        targets: Rows x columns.
        strengths: Those to try.
        blocks: Widths of the blocks of features; None: they are centred and otherwise as they are.

    Raises:
        CalibrationError: If either is not 2-D or has NaN or infinite values, or they differ in rows or have under two.
        StitchError: If there are no strengths, one is not a positive finite number, or the blocks do not fit.
    """
    check_strengths(strengths)
    all_finite(features, "features")
    targets = paired(features[:, :1], targets, ("features", "targets"))[1].to(features.device)
    n, d = features.shape
    _require_two(n)
    scaling = Scaling.of(features, blocks)
    centred = targets - targets.mean(0)
    if n <= d:
        gram = targets.new_zeros(n, n)
        for columns in _column_slices(features):
            z = scaling.apply(features, columns)
            gram += z @ z.T
        eigenvalues, u = _decompose(gram, max(n, d))
        projected = u.T @ centred

        def in_features(solution: Tensor) -> Tensor:
            dual = u @ solution
            return torch.cat([scaling.apply(features, columns).T @ dual for columns in _column_slices(features)])

        bases: Callable[[], Iterator[Tensor]] = partial(_once, u)
    else:
        gram, cross = targets.new_zeros(d, d), targets.new_zeros(d, targets.shape[1])
        for rows in _row_slices(features):
            z = scaling.apply(features[rows])
            gram += z.T @ z
            cross += z.T @ centred[rows]
        eigenvalues, v = _decompose(gram, max(n, d))
        v = v / eigenvalues.sqrt()
        projected = v.T @ cross

        def in_features(solution: Tensor) -> Tensor:
            return v @ (eigenvalues[:, None] * solution)

        def bases() -> Iterator[Tensor]:
            return (scaling.apply(features[rows]) @ v for rows in _row_slices(features))

    def weights(solution: Tensor) -> AffineMap:
        weight = (scaling.scale[:, None] * in_features(solution)).T
        return AffineMap(weight, targets.mean(0) - weight @ scaling.mean, None, None, 0.0)

    scale = eigenvalues.sum().item() / min(n - 1, d)
    return LooRidge(tuple(strengths), scale, targets, eigenvalues, projected, bases, weights)


def loo_ridge_of_gram(gram: Tensor, targets: Tensor, *, strengths: Sequence[float]) -> LooRidge:
    """The same from the Gram matrix of the rows (n x n), centred here: predictions, no weights.

    lambda = strength * the mean of its eigenvalues that are not 0.

    Raises:
        CalibrationError: If either has NaN or infinite values, or they differ in rows or have under two.
        StitchError: If there are no strengths, or one is not a positive finite number.
    """
    check_strengths(strengths)
    gram, targets = paired(gram, targets, ("the Gram matrix", "targets"))
    _require_two(len(gram))
    eigenvalues, u = _decompose(centre_gram(gram), len(gram))
    projected = u.T @ (targets - targets.mean(0))
    scale = eigenvalues.sum().item() / max(len(eigenvalues), 1)
    return LooRidge(tuple(strengths), scale, targets, eigenvalues, projected, partial(_once, u), None)


def block_gram(block: Tensor) -> Tensor:
    """The Gram matrix (rows x rows), float64, of one block of features (rows x width).

    Each feature is standardised over the rows (one that does not vary counts nothing) and the block divided by the root
    of its width, so that the mean of the diagonal is 1 where all vary. The Gram matrix of several blocks is the sum.

    Raises:
        CalibrationError: If it has NaN or infinite values.
    """
    all_finite(block, "features")
    scaling = Scaling.of(block, [block.shape[1]])
    gram = block.new_zeros(len(block), len(block), dtype=torch.float64)
    for columns in _column_slices(block):
        z = scaling.apply(block, columns)
        gram += z @ z.T
    return gram


def centre_gram(gram: Tensor) -> Tensor:
    """The Gram matrix of the rows less their mean."""
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def check_blocks(blocks: Sequence[int], num_features: int) -> None:
    """Refuse (StitchError) widths of blocks that are not positive, or are not the features' together."""
    if min(blocks, default=0) < 1 or sum(blocks) != num_features:
        raise StitchError(
            f"blocks= are the widths of all {num_features} features in a row, each at least 1; found "
            f"{list(blocks)[:10]}, {sum(blocks)} together."
        )


def check_strengths(strengths: Sequence[float]) -> None:
    """Refuse (StitchError) ridge strengths that are not positive finite numbers, or none."""
    if not strengths or not all(0 < strength < torch.inf for strength in strengths):
        raise StitchError(f"Ridge strengths must be one or more positive finite numbers; found {list(strengths)}.")


def _decompose(gram: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues that exceed rounding, of a matrix from sums of so many products, and their vectors."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    first = int((eigenvalues <= eigenvalues[-1] * size * torch.finfo(torch.float64).eps).sum())
    return eigenvalues[first:], vectors[:, first:]


def _require_two(num_rows: int) -> None:
    if num_rows < 2:
        raise CalibrationError(f"Leaving one row out needs at least 2 rows; found {num_rows}.")


def _once(u: Tensor) -> Iterator[Tensor]:
    yield u


def _column_slices(features: Tensor) -> Iterator[slice]:
    step = max(1, PORTION // max(len(features), 1))
    return (slice(first, first + step) for first in range(0, features.shape[1], step))


def _row_slices(features: Tensor) -> Iterator[slice]:
    step = max(1, PORTION // features.shape[1])
    return (slice(first, first + step) for first in range(0, len(features), step))


def _by_columns(features: Tensor) -> Iterator[Tensor]:
    return (features[:, columns] for columns in _column_slices(features))
