"""Pure tensor maths: linear CKA of whole, streamed and stored rows, ridge least squares, leave-one-out ridge.

Rows are samples (images, pixels, tokens), columns are channels. Inputs are of any real dtype; sums run in float64 on
the input's device. X, Y centred, d_i = |x_i|^2, e_i = |y_i|^2: CKA = HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) for
HSIC = ||X'Y||_F^2 (biased), or ||X'Y||_F^2 - n/(n-2) d.e + sum(d) sum(e) / ((n-1)(n-2)) (debiased): n(n-3) times the
unbiased estimator of Song et al. 2012, whose Gram matrices lack their diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError

Estimator = Literal["debiased", "biased"]
_MIN_ROWS = {"debiased": 4, "biased": 2}  # n(n-3) must not be zero; a single row does not deviate from its mean
_NOISE = 4 * torch.finfo(torch.float32).eps  # a column whose deviations are a smaller share of its mean is constant
_CANCELLED = 1e-12  # a debiased self-similarity that is a smaller share of the biased one is rounding error


def linear_cka(x: Tensor, y: Tensor, *, estimator: Estimator = "debiased") -> Tensor:
    """Linear centered kernel alignment of two activations on the same rows (Kornblith et al. 2019; Nguyen et al. 2021).

    1 for activations equal up to rotation, scale and shift. Unrelated ones score about 0 when debiased (some below),
    but near 1 when biased (the StitchNet paper's) and channels outnumber rows; there it runs in Gram space.
    x and y are rows x channels with the same rows; the result is a 0-dim float64 tensor, never NaN.

    Raises:
        CalibrationError: If x or y is not 2-D, has under 4 rows (biased: 2), is constant or not finite, or rows differ.

    Example:
        >>> x = torch.arange(10.0).reshape(5, 2) ** 2
        >>> round(linear_cka(x, 7 * x.flip(1) + 5).item(), 6)
        1.0
    """
    x, y = _paired(x, y)
    x, d, self_x = _prepared(x, "x", estimator)
    y, e, self_y = _prepared(y, "y", estimator)
    return _cka(_hsic(_cross_square(x, y), d @ e, d.sum(), e.sum(), len(x), estimator), self_x, self_y)


@dataclass(frozen=True, slots=True, eq=False)
class CKAMoments:
    """What linear CKA needs of a group of rows, float64, about the group's own `mean` (c,); merges without loss.

    With z = (x, y) the deviations of a row from the mean, x's channels first, and s = (|x|^2, |y|^2), the fields are
    the sums over rows of z z' (c x c), s z' (2 x c) and s s' (2 x 2).
    """

    num_rows: int
    x_channels: int
    mean: Tensor
    zz: Tensor
    sz: Tensor
    ss: Tensor


def cka_moments(x: Tensor, y: Tensor) -> CKAMoments:
    """Moments of one batch of at least one row; x and y are rows x channels.

    Raises:
        CalibrationError: If x or y is not 2-D, is empty, has NaN or infinite values, or they differ in rows.
    """
    z = torch.cat(_paired(x, y), dim=1)
    mean = z.mean(0)
    z = z - mean
    s = torch.stack([part.square().sum(1) for part in z.tensor_split([x.shape[1]], dim=1)])
    return CKAMoments(len(z), x.shape[1], mean, z.T @ z, s @ z, s @ s.T)


def merge_cka_moments(first: CKAMoments, second: CKAMoments) -> CKAMoments:
    """Moments of two groups of rows together; the order of merging changes nothing but rounding.

    Raises:
        CalibrationError: If the groups differ in their numbers of channels.
    """
    one, other = ((m.x_channels, len(m.mean) - m.x_channels) for m in (first, second))
    if one != other:
        raise CalibrationError(f"All batches must have the same channels (of x, of y); found {one} and {other}.")
    num_rows = first.num_rows + second.num_rows
    step = (second.mean - first.mean) / num_rows
    a, b = _moved(first, -second.num_rows * step), _moved(second, first.num_rows * step)
    return CKAMoments(num_rows, first.x_channels, a.mean, a.zz + b.zz, a.sz + b.sz, a.ss + b.ss)


def cka_from_moments(moments: CKAMoments, *, estimator: Estimator = "debiased") -> Tensor:
    """Linear CKA of all rows that went into the moments: `linear_cka`'s value, as a 0-dim float64 tensor.

    Raises:
        CalibrationError: If there are too few rows for the estimator, or x or y has the same values in every row.
    """
    m, n, cut = moments, moments.num_rows, moments.x_channels
    _check_num_rows(n, estimator)
    for name, part in (("x", slice(cut)), ("y", slice(cut, None))):
        _check_varies(m.zz.diagonal()[part] / n, m.mean[part], n, name)
    xx, xy, yy = m.zz[:cut, :cut], m.zz[:cut, cut:], m.zz[cut:, cut:]
    d, e = xx.trace(), yy.trace()
    self_x = _self_similarity(xx.square().sum(), m.ss[0, 0], d, n, estimator, "x")
    self_y = _self_similarity(yy.square().sum(), m.ss[1, 1], e, n, estimator, "y")
    return _cka(_hsic(xy.square().sum(), m.ss[0, 1], d, e, n, estimator), self_x, self_y)


@dataclass(frozen=True, slots=True, eq=False)
class CentredRows:
    """One activation made ready to be scored against many.

    Its rows (n x channels, float32, centred in float64 before the cast), their squared lengths (n,) in float64, and its
    HSIC with itself by the estimator, always positive.
    """

    rows: Tensor
    squared_norms: Tensor
    self_similarity: float
    estimator: Estimator


@dataclass(frozen=True, slots=True, eq=False)
class RowBank:
    """The `CentredRows` of k activations on the same rows, joined so that one product scores them all.

    Their rows transposed and stacked (all channels x n, float32), the channels of each, and in float64 their squared
    lengths (k x n) and self-similarities (k,).
    """

    columns: Tensor
    widths: tuple[int, ...]
    squared_norms: Tensor
    self_similarity: Tensor
    estimator: Estimator


def centre_rows(x: Tensor, *, estimator: Estimator = "debiased", name: str = "x") -> CentredRows:
    """Centre an activation (rows x channels) once, for `cka_with_many` and `row_bank`; errors call it `name`.

    Raises:
        CalibrationError: As `linear_cka`, for this one activation.
    """
    x, d, similarity = _prepared(_rows(x, name), name, estimator)
    return CentredRows(x.float(), d, similarity.item(), estimator)


def row_bank(ys: Sequence[CentredRows]) -> RowBank:
    """Join centred activations for `cka_with_many`; costs one copy of their rows.

    Raises:
        CalibrationError: If there are none, or they differ in rows or estimator.
    """
    kinds = sorted({(len(y.rows), y.estimator) for y in ys})
    if len(kinds) != 1:
        raise CalibrationError(f"A row bank takes activations of the same rows and estimator; found {kinds or 'none'}.")
    columns, widths = torch.cat([y.rows.T for y in ys]), tuple(y.rows.shape[1] for y in ys)
    norms = torch.stack([y.squared_norms for y in ys])
    return RowBank(columns, widths, norms, norms.new_tensor([y.self_similarity for y in ys]), kinds[0][1])


def cka_with_many(x: CentredRows, ys: RowBank | Sequence[CentredRows]) -> Tensor:
    """Linear CKA of one activation with each of k, (k,) float64: `linear_cka` to 1e-6 by one float32 product.

    The product, Y'X or the cheaper Y'(XX'), is as accurate as `torch.set_float32_matmul_precision` lets it be; under 16
    channels it is in float64, as narrow products add row by row. Autocast is off. A `row_bank` saves joining the ys.

    Raises:
        CalibrationError: If rows or estimator of x and ys differ, or ys is empty.
    """
    bank = ys if isinstance(ys, RowBank) else row_bank(ys)
    (n, channels), (total, bank_rows) = x.rows.shape, bank.columns.shape
    if (kinds := [(n, x.estimator), (bank_rows, bank.estimator)])[0] != kinds[1]:
        raise CalibrationError(f"x and the bank must have the same rows and estimator; found {kinds}.")
    with torch.autocast(x.rows.device.type, enabled=False):
        if n * (channels + total) < channels * total:  # ||X'Y||_F^2 = <Y', Y'XX'>
            product = bank.columns @ (x.rows @ x.rows.T)
            pairs = zip(bank.columns.split(bank.widths), product.split(bank.widths), strict=True)
            cross = [y.double().mul_(yk).sum() for y, yk in pairs]
        else:
            dtype = torch.float64 if min(channels, total) < 16 else torch.float32
            parts = (bank.columns.to(dtype) @ x.rows.to(dtype)).split(bank.widths)
            cross = [torch.linalg.vector_norm(yx, dtype=torch.float64).square() for yx in parts]
    d, e = x.squared_norms, bank.squared_norms
    hsic = _hsic(torch.stack(cross), e @ d, d.sum(), e.sum(1), n, x.estimator)
    return _cka(hsic, e.new_tensor(x.self_similarity), bank.self_similarity)


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """The least-squares map y = weight x + bias: weight (out x in) and bias (out,), float64; no bias if fitted without.

    `rank` counts the eigenvalues of the Gram matrix that were kept, `condition` is the largest over the smallest of
    them, lambda added to both (1 if none was kept), and `ridge` is the lambda that was used.
    """

    weight: Tensor
    bias: Tensor | None
    rank: int
    condition: float
    ridge: float


def ridge_least_squares(x: Tensor, y: Tensor, *, ridge: float = 1e-3, bias: bool = True) -> AffineMap:
    """Affine map of least squared error from x (rows x in) to y (rows x out): min ||X A - Y||_F^2 + lambda ||A||_F^2.

    lambda = ridge * trace(X'X) / in; X and Y are centred where there is a bias, which is not penalised. Solved from the
    eigenvalues of the smaller of X'X and XX' that exceed max(rows, in) * 2.2e-16 of the largest (singular values above
    about 1e-6 of the largest). `ridge=0, bias=False` is the StitchNet paper's Y' pinv(X').

    Raises:
        CalibrationError: If x or y is not 2-D, is empty, has NaN or infinite values, or they differ in rows.
        StitchError: If `ridge` is negative or not finite.
    """
    if not 0 <= ridge < torch.inf:
        raise StitchError(f"ridge must be a finite number of at least 0; found {ridge}.")
    problem = _regression(*_paired(x, y), centre=bias)
    return _affine_map(problem, ridge * problem.eigenvalues.sum().item() / x.shape[1], bias=bias)


def r2(prediction: Tensor, target: Tensor) -> float:
    """R2 of a prediction, rows x columns like the target: 1 - SSE / SST over all columns, SST about the target's means.

    Raises:
        CalibrationError: If shapes differ, values are NaN or infinite, or the target is constant.
    """
    prediction, target = _paired(prediction, target, ("the prediction", "the target"))
    if prediction.shape != target.shape:
        raise CalibrationError(f"The target has {target.shape[1]} columns, the prediction {prediction.shape[1]}.")
    return 1 - ((prediction - target).square().sum() / _centred(target, "the target").square().sum()).item()


@dataclass(frozen=True, slots=True, eq=False)
class _Regression:
    """x (n x d, centred) = basis (n x r) diag(sqrt(eigenvalues)) V'; projected (r x k) = basis' (y - mean_y)."""

    x: Tensor
    mean_x: Tensor
    mean_y: Tensor
    basis: Tensor
    eigenvalues: Tensor
    projected: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LooRidge:
    """Ridge regression for a grid of strengths; `ridge_weights` makes the map for any one, `scale` times it the lambda.

    `predictions` (strengths x n x k, float64) holds row i as predicted from all rows but i.
    """

    strengths: tuple[float, ...]
    predictions: Tensor
    scale: float
    problem: _Regression


def loo_ridge(features: Tensor, targets: Tensor, *, strengths: Sequence[float]) -> LooRidge:
    """Exact leave-one-out predictions of ridge regression (n x d to n x k), intercept free, from one decomposition.

    lambda = strength * trace(X'X) / min(n - 1, d) of all rows, relative to the mean eigenvalue of the centred features.
    With H = 11'/n + U diag(s / (s + lambda)) U', the residual of a row left out is (y - Hy)_i / (1 - h_ii).

    Raises:
        CalibrationError: If either is not 2-D or has NaN or infinite values, or they differ in rows or have under two.
        StitchError: If there are no strengths, or one is not a positive finite number.
    """
    _check_strengths(strengths)
    features, targets = _paired(features, targets, ("features", "targets"))
    n, d = features.shape
    if n < 2:
        raise CalibrationError("Leaving one row out needs at least 2 rows; found 1.")
    problem = _regression(features, targets, centre=True)
    scale = problem.eigenvalues.sum().item() / min(n - 1, d)
    u, uy = problem.basis, problem.projected
    # 1 - s / (s + lambda) is written lambda / (s + lambda), so that nothing cancels where the fit nearly interpolates.
    penalties = scale * targets.new_tensor(list(strengths))[:, None]
    shrinkage = penalties / (problem.eigenvalues + penalties)
    residual = targets - problem.mean_y - u @ uy + torch.einsum("nr,grk->gnk", u, shrinkage[:, :, None] * uy)
    slack = (1 - 1 / n - u.square().sum(1)).clamp_min(0) + shrinkage @ u.square().T
    return LooRidge(tuple(strengths), targets - residual / slack[:, :, None], scale, problem)


def ridge_weights(fit: LooRidge, *, strength: float) -> AffineMap:
    """The map fitted on all rows with one strength, of the grid or not.

    Raises:
        StitchError: If the strength is not a positive finite number.
    """
    _check_strengths([strength])
    return _affine_map(fit.problem, strength * fit.scale, bias=True)


def _rows(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or 0 in x.shape:
        needed = "must be rows x channels, 2-D and not empty (flatten maps and tokens first)"
        raise CalibrationError(f"{name} {needed}; found shape {tuple(x.shape)}.")
    x = x.double()
    if not x.sum().isfinite() and (num_bad := int((~x.isfinite().all(1)).sum())):
        cause = "Look for overflow (half precision?) or broken images or weights before this point."
        raise CalibrationError(f"{name} has NaN or infinite values in {num_bad} of its {len(x)} rows. {cause}")
    return x


def _prepared(x: Tensor, name: str, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    _check_num_rows(len(x), estimator, name)
    x = _centred(x, name)
    d = x.square().sum(1)
    return x, d, _self_similarity(_cross_square(x, x), d @ d, d.sum(), len(x), estimator, name)


def _paired(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    if x.ndim == y.ndim == 2 and len(x) != len(y):
        shapes = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        raise CalibrationError(f"{' and '.join(names)} must have the same number of rows; found {shapes}.")
    return _rows(x, names[0]), _rows(y, names[1])


def _centred(x: Tensor, name: str) -> Tensor:
    mean = x.mean(0)
    x = x - mean
    _check_varies(x.square().mean(0), mean, len(x), name)
    return x


def _check_varies(variance: Tensor, mean: Tensor, n: int, name: str) -> None:
    if bool((variance <= (_NOISE * mean).square()).all()):
        found = f"its {n} rows of {len(mean)} channels are equal up to rounding"
        raise CalibrationError(f"{name} is constant: {found}. Look for a dead layer or identical images.")


def _check_num_rows(n: int, estimator: Estimator, name: str = "x and y") -> None:
    if estimator not in _MIN_ROWS:
        raise StitchError(f"There is no CKA estimator {estimator!r}; choose one of {list(_MIN_ROWS)}.")
    if n < _MIN_ROWS[estimator]:
        needed = f"{estimator.capitalize()} CKA needs at least {_MIN_ROWS[estimator]} rows"
        raise CalibrationError(f"{needed}; found {n} in {name}. Use more calibration images, or more rows of each.")


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or not all(0 < strength < torch.inf for strength in strengths):
        raise StitchError(f"Ridge strengths must be one or more positive finite numbers; found {list(strengths)}.")


def _cross_square(x: Tensor, y: Tensor) -> Tensor:
    """||X'Y||_F^2 from the smaller kind of product."""
    if len(x) >= min(x.shape[1], y.shape[1]):
        return (x.T @ y).square().sum()
    gram = x @ x.T
    return (gram * (gram if y is x else y @ y.T)).sum()


def _hsic(cross: Tensor, dot: Tensor, trace_x: Tensor, trace_y: Tensor, n: int, estimator: Estimator) -> Tensor:
    if estimator == "biased":
        return cross
    return cross - n / (n - 2) * dot + trace_x * trace_y / ((n - 1) * (n - 2))


def _self_similarity(cross: Tensor, dot: Tensor, trace: Tensor, n: int, estimator: Estimator, name: str) -> Tensor:
    value = _hsic(cross, dot, trace, trace, n, estimator)
    if bool(value < _CANCELLED * cross):
        found = f"no two of its {n} rows have anything in common, as when they are too few"
        raise CalibrationError(f"{name} has no debiased similarity to itself: {found}. Use more rows, or 'biased'.")
    return value


def _cka(cross: Tensor, self_x: Tensor, self_y: Tensor) -> Tensor:
    value = cross / (self_x.sqrt() * self_y.sqrt())
    if not bool(value.isfinite().all()):
        raise CalibrationError("CKA overflows: the activations' values are too large or too small. Rescale them.")
    return value


def _moved(m: CKAMoments, step: Tensor) -> CKAMoments:
    """The moments about means moved so that every deviation z becomes z + step."""
    n, cut = m.num_rows, m.x_channels
    blocks = torch.block_diag(*step.tensor_split([cut]))  # s becomes s + 2 blocks z + lengths
    lengths = blocks.square().sum(1)
    sums = torch.stack([part.sum() for part in m.zz.diagonal().tensor_split([cut])])
    mixed = sums.outer(lengths) + 2 * m.sz @ blocks.T
    ss = m.ss + mixed + mixed.T + 4 * blocks @ m.zz @ blocks.T + n * lengths.outer(lengths)
    sz = m.sz + (sums + n * lengths).outer(step) + 2 * blocks @ m.zz
    return CKAMoments(n, cut, m.mean - step, m.zz + n * step.outer(step), sz, ss)


def _regression(x: Tensor, y: Tensor, *, centre: bool) -> _Regression:
    mean_x, mean_y = (x.mean(0), y.mean(0)) if centre else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
    x = x - mean_x
    wide = x.shape[0] <= x.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    first = int((eigenvalues <= eigenvalues[-1] * max(x.shape) * torch.finfo(torch.float64).eps).sum())
    eigenvalues, vectors = eigenvalues[first:], vectors[:, first:]
    basis = vectors if wide else x @ vectors / eigenvalues.sqrt()
    return _Regression(x, mean_x, mean_y, basis, eigenvalues, basis.T @ (y - mean_y))


def _affine_map(problem: _Regression, ridge: float, *, bias: bool) -> AffineMap:
    s = problem.eigenvalues
    weight = (problem.x.T @ (problem.basis @ (problem.projected / (s + ridge)[:, None]))).T
    condition = ((s[-1] + ridge) / (s[0] + ridge)).item() if len(s) else 1.0
    return AffineMap(weight, problem.mean_y - weight @ problem.mean_x if bias else None, len(s), condition, ridge)
