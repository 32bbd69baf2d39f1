"""Ridge regression for many strengths at once, judged on rows left out of its fit: exact, from one decomposition.

With H = 11'/n + U diag(s / (s + lambda)) U' of centred rows Z = U diag(sqrt(s)) V', the residual of a row left out is
(y - Hy)_i / (1 - h_ii) (Allen's PRESS; Hastie, Tibshirani, Friedman, "The elements of statistical learning", 7.10). The
free intercept is the constant direction 11'/n, which 1 - h_ii therefore leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.blocks import check_blocks, scale_of
from lightning_stitch.maths.decomposition import AffineMap, RidgeProblem, decompose, decompose_gram
from lightning_stitch.maths.rows import THICK, check_pair, portions


@dataclass(frozen=True, slots=True, eq=False)
class LooRidge:
    """Ridge regression for a grid of strengths; `ridge_weights` makes the map for any one.

    Attributes:
        strengths: Relative to `scale`.
        scale: The mean eigenvalue of the centred rows' Gram matrix; a strength times it is the lambda.
        errors: Leave-one-out squared errors, summed over rows: (strengths, k), float64.
        problem: The decomposition.
        targets: What is regressed on: n x k, float64.
    """

    strengths: tuple[float, ...]
    scale: float
    errors: Tensor
    problem: RidgeProblem
    targets: Tensor

    @property
    def best_strength(self) -> float:
        """The strength of least leave-one-out squared error; of equal ones the first."""
        return self.strengths[int(self.errors.sum(1).argmin())]

    @property
    def predictions(self) -> Tensor:
        """Row i as predicted from all rows but i, at every strength (strengths x n x k, float64); made at each call."""
        return self.predict_left_out(self.strengths)

    def predict_left_out(self, strengths: Sequence[float]) -> Tensor:
        """Row i as predicted from all rows but i, at strengths of the grid or not (strengths x n x k, float64)."""
        _check_strengths(strengths)
        residuals = _residuals(self.problem, self.targets, [strength * self.scale for strength in strengths])
        return self.targets - torch.cat(list(residuals), dim=1)


@torch.no_grad()
def loo_ridge(
    features: Tensor, targets: Tensor, *, strengths: Sequence[float], blocks: Sequence[int] | None = None
) -> LooRidge:
    """Exact leave-one-out errors and predictions of ridge regression (n x d to n x k), intercept free.

    lambda = strength * trace(Z'Z) / min(n - 1, d) of all rows, relative to the mean eigenvalue of the centred features.
    Decomposed is the smaller of Z'Z and ZZ', summed in float64 over portions: beyond features and targets it takes a
    few matrices of min(n, d)^2 and a portion of rows or columns (256, or 2 MiB), however long and wide features are.

    Args:
        features: Rows x features, any real dtype.
        targets: Rows x columns.
        strengths: Of which all are judged.
        blocks: Widths of consecutive blocks of features, of which each feature is standardised and each block divided
            by the root of its width (`block_gram`): by all rows, so that a row that is left out still takes part in
            means and deviations. None: features are only centred.

    Raises:
        CalibrationError: If either is not 2-D or has NaN or infinite values, or they differ in rows or have under two.
        StitchError: If there are no strengths, or one is not a positive finite number, or the blocks do not fit.
    """
    _check_strengths(strengths)
    _check_rows_left(features, targets)
    problem = decompose(features, targets, scale_of(features, blocks))
    return _judged(problem, targets, strengths, num_directions=min(len(features) - 1, features.shape[1]))


@torch.no_grad()
def loo_ridge_of_gram(gram: Tensor, targets: Tensor, *, strengths: Sequence[float]) -> LooRidge:
    """`loo_ridge` from the Gram matrix of rows, as the sum of several `block_gram`; it has no weights.

    Standardisation is that of all rows, which went into the matrix: a row that is left out is left out of the
    regression, not of means and deviations.

    Args:
        gram: Rows x rows, symmetric, centred or not.
        targets: Rows x columns.
        strengths: Relative to the mean eigenvalue of the centred matrix that is not 0, which is `loo_ridge`'s scale
            where no feature follows from the others.

    Raises:
        CalibrationError: If the matrix is not square or has NaN or infinite values, or it and targets differ in rows or
            have under two.
        StitchError: If there are no strengths, or one is not a positive finite number.

    Example:
        >>> from lightning_stitch.maths.blocks import block_gram
        >>> blocks = torch.arange(12.0).reshape(2, 6, 1).sin()
        >>> fit = loo_ridge_of_gram(sum(map(block_gram, blocks)), blocks[0] + 1, strengths=[0.01, 1])
        >>> fit.best_strength, tuple(fit.predictions.shape)
        (0.01, (2, 6, 1))
    """
    _check_strengths(strengths)
    _check_rows_left(gram, targets, "the Gram matrix")
    if gram.shape[0] != gram.shape[1]:
        raise CalibrationError(f"A Gram matrix of rows is rows x rows; found shape {tuple(gram.shape)}.")
    problem = decompose_gram(gram, targets)
    return _judged(problem, targets, strengths, num_directions=max(1, len(problem.eigenvalues)))


@torch.no_grad()
def ridge_weights(fit: LooRidge, *, strength: float) -> AffineMap:
    """The map of raw features fitted on all rows with one strength, of the grid or not.

    Raises:
        StitchError: If the strength is not a positive finite number, or the fit was made from a Gram matrix.
    """
    _check_strengths([strength])
    return fit.problem.map_at(strength * fit.scale)


@torch.no_grad()
def block_shares(fit: LooRidge, *, strength: float, blocks: Sequence[int]) -> tuple[float, ...]:
    """How much each block of features contributes to the predictions of the fit's rows at one strength.

    A share is the covariance of the block's part of a prediction with the whole, over the variance of the whole, each
    summed over columns. They sum to 1 (all are 0 if predictions do not vary); that of a block which others outweigh
    can be negative.

    Raises:
        StitchError: If the strength is not a positive finite number, the blocks do not fit the features, or the fit was
            made from a Gram matrix.
    """
    _check_strengths([strength])
    contributions = fit.problem.contributions_at(strength * fit.scale)
    check_blocks(blocks, len(contributions))
    sums = torch.stack([part.sum() for part in contributions.split(list(blocks))])
    total = sums.sum()
    return tuple((sums / total if total > 0 else torch.zeros_like(sums)).tolist())


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or not all(0 < strength < torch.inf for strength in strengths):
        raise StitchError(f"Ridge strengths must be one or more positive finite numbers; found {list(strengths)}.")


def _check_rows_left(features: Tensor, targets: Tensor, name: str = "features") -> None:
    check_pair(features, targets, (name, "targets"))
    if len(features) < 2:
        raise CalibrationError("Leaving one row out needs at least 2 rows; found 1.")


def _judged(problem: RidgeProblem, targets: Tensor, strengths: Sequence[float], *, num_directions: int) -> LooRidge:
    scale = problem.eigenvalues.sum().item() / num_directions
    targets = targets.double()
    penalties = [strength * scale for strength in strengths]
    errors = torch.stack([part.square().sum(1) for part in _residuals(problem, targets, penalties)]).sum(0)
    return LooRidge(tuple(strengths), scale, errors, problem, targets)


def _residuals(problem: RidgeProblem, targets: Tensor, penalties: Sequence[float]) -> Iterator[Tensor]:
    """What is left of each row's targets (penalties x rows x k) when it is left out, in portions of rows."""
    (n, k), uy = targets.shape, problem.projected
    # 1 - s / (s + lambda) is written lambda / (s + lambda), so that nothing cancels where the fit nearly interpolates.
    lambdas = targets.new_tensor(penalties)[:, None]
    shrinkage = lambdas / (problem.eigenvalues + lambdas)
    for part in portions(n, max(len(problem.vectors), len(penalties) * k), fewest=THICK):
        u = problem.basis(part)
        residual = targets[part] - problem.mean_y - u @ uy + torch.einsum("nr,grk->gnk", u, shrinkage[:, :, None] * uy)
        slack = (1 - 1 / n - u.square().sum(1)).clamp_min(0) + shrinkage @ u.square().T
        yield residual / slack[:, :, None]
