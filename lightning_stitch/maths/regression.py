"""Linear regression in closed form: ridge least squares, and how much a prediction explains.

Rows are samples (images, pixels, tokens), columns are channels. Inputs are of any real dtype; sums run in float64 on
the input's device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.rows import centred, paired


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """The least-squares map y = weight x + bias: weight (out x in) and bias (out,), float64; no bias if fitted without.

    `rank` counts the eigenvalues of the Gram matrix that were kept, `condition` is the largest over the smallest of
    them, lambda added to both (1 if none was kept); both are None where they were not asked for. `ridge` is the lambda
    that was used.
    """

    weight: Tensor
    bias: Tensor | None
    rank: int | None
    condition: float | None
    ridge: float

    def __call__(self, x: Tensor) -> Tensor:
        """What the map makes of x (rows x in, float64)."""
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def ridge_least_squares(
    x: Tensor, y: Tensor, *, ridge: float = 1e-3, bias: bool = True, diagnose: bool = True
) -> AffineMap:
    """Affine map of least squared error from x (rows x in) to y (rows x out): min ||X A - Y||_F^2 + lambda ||A||_F^2.

    lambda = ridge * trace(X'X) / in; X and Y are centred where there is a bias, which is not penalised. Solved from the
    eigenvalues of the smaller of X'X and XX' that exceed max(rows, in) * 2.2e-16 of the largest (singular values above
    about 1e-6 of the largest). `ridge=0, bias=False` is the StitchNet paper's Y' pinv(X').

    Args:
        x: Rows x in.
        y: Rows x out.
        ridge: Strength, relative to the mean variance of x's columns.
        bias: Whether the map has a bias.
        diagnose: Whether rank and condition are wanted. Without them, X'X + lambda is factorised (Cholesky) where it is
            regular, which takes a few milliseconds where eigenvalues take 40.

    Raises:
        CalibrationError: If x or y is not 2-D, is empty, has NaN or infinite values, or they differ in rows.
        StitchError: If `ridge` is negative or not finite.
    """
    if not 0 <= ridge < torch.inf:
        raise StitchError(f"ridge must be a finite number of at least 0; found {ridge}.")
    x, y = paired(x, y)
    if not diagnose and ridge and x.shape[0] >= x.shape[1]:
        return _by_factorisation(x, y, ridge=ridge, bias=bias)
    problem = _regression(x, y, centre=bias)
    return _affine_map(problem, ridge * problem.eigenvalues.sum().item() / x.shape[1], bias=bias)


def r2(prediction: Tensor, target: Tensor) -> float:
    """R2 of a prediction, rows x columns like the target: 1 - SSE / SST over all columns, SST about the target's means.

    Raises:
        CalibrationError: If shapes differ, values are NaN or infinite, or the target is constant.
    """
    prediction, target = paired(prediction, target, ("the prediction", "the target"))
    if prediction.shape != target.shape:
        raise CalibrationError(f"The target has {target.shape[1]} columns, the prediction {prediction.shape[1]}.")
    return 1 - ((prediction - target).square().sum() / centred(target, "the target").square().sum()).item()


@dataclass(frozen=True, slots=True, eq=False)
class _Regression:
    """x (n x d, centred) = basis (n x r) diag(sqrt(eigenvalues)) V'; projected (r x k) = basis' (y - mean_y)."""

    x: Tensor
    mean_x: Tensor
    mean_y: Tensor
    basis: Tensor
    eigenvalues: Tensor
    projected: Tensor


def _regression(x: Tensor, y: Tensor, *, centre: bool) -> _Regression:
    mean_x, mean_y = _means(x, y, centre=centre)
    x = x - mean_x
    wide = x.shape[0] <= x.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    first = int((eigenvalues <= eigenvalues[-1] * max(x.shape) * torch.finfo(torch.float64).eps).sum())
    eigenvalues, vectors = eigenvalues[first:], vectors[:, first:]
    basis = vectors if wide else x @ vectors / eigenvalues.sqrt()
    return _Regression(x, mean_x, mean_y, basis, eigenvalues, basis.T @ (y - mean_y))


def _by_factorisation(x: Tensor, y: Tensor, *, ridge: float, bias: bool) -> AffineMap:
    mean_x, mean_y = _means(x, y, centre=bias)
    x = x - mean_x
    gram = x.T @ x
    penalty = ridge * gram.trace().item() / len(gram)
    # Where x does not vary there is nothing to predict from.
    gram.diagonal().add_(max(penalty, 1e-30))
    weight = torch.cholesky_solve(x.T @ (y - mean_y), torch.linalg.cholesky(gram)).T
    return AffineMap(weight, mean_y - weight @ mean_x if bias else None, None, None, penalty)


def _means(x: Tensor, y: Tensor, *, centre: bool) -> tuple[Tensor, Tensor]:
    return (x.mean(0), y.mean(0)) if centre else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))


def _affine_map(problem: _Regression, ridge: float, *, bias: bool) -> AffineMap:
    s = problem.eigenvalues
    weight = (problem.x.T @ (problem.basis @ (problem.projected / (s + ridge)[:, None]))).T
    condition = ((s[-1] + ridge) / (s[0] + ridge)).item() if len(s) else 1.0
    return AffineMap(weight, problem.mean_y - weight @ problem.mean_x if bias else None, len(s), condition, ridge)
