"""Linear regression in closed form: ridge least squares, and how much a prediction explains.

Rows are samples (images, pixels, tokens), columns are channels. Inputs are of any real dtype; sums run in float64 on
the input's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.blocks import Scaling
from lightning_stitch.maths.decomposition import AffineMap, decompose
from lightning_stitch.maths.rows import centred, paired


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
    mean = x.mean(0) if bias else x.new_zeros(x.shape[1])
    problem = decompose(x, y, Scaling(mean, torch.ones_like(mean)), centred=bias)
    return problem.map_at(ridge * problem.eigenvalues.sum().item() / x.shape[1], bias=bias)


def r2(prediction: Tensor, target: Tensor) -> float:
    """R2 of a prediction, rows x columns like the target: 1 - SSE / SST over all columns, SST about the target's means.

    Raises:
        CalibrationError: If shapes differ, values are NaN or infinite, or the target is constant.
    """
    prediction, target = paired(prediction, target, ("the prediction", "the target"))
    if prediction.shape != target.shape:
        raise CalibrationError(f"The target has {target.shape[1]} columns, the prediction {prediction.shape[1]}.")
    return 1 - ((prediction - target).square().sum() / centred(target, "the target").square().sum()).item()


def _by_factorisation(x: Tensor, y: Tensor, *, ridge: float, bias: bool) -> AffineMap:
    mean_x, mean_y = (rows.mean(0) if bias else rows.new_zeros(rows.shape[1]) for rows in (x, y))
    x = x - mean_x
    gram = x.T @ x
    penalty = ridge * gram.trace().item() / len(gram)
    # Where x does not vary there is nothing to predict from.
    gram.diagonal().add_(max(penalty, 1e-30))
    weight = torch.cholesky_solve(x.T @ (y - mean_y), torch.linalg.cholesky(gram)).T
    return AffineMap(weight, mean_y - weight @ mean_x if bias else None, None, None, penalty)
