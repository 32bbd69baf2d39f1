"""Linear CKA as pure tensor maths: of whole, streamed and stored rows.

Rows are samples (images, pixels, tokens), columns are channels. Inputs are of any real dtype; sums run in float64 on
the input's device. X, Y centred, d_i = |x_i|^2, e_i = |y_i|^2: CKA = HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) for
HSIC = ||X'Y||_F^2 (biased), or ||X'Y||_F^2 - n/(n-2) d.e + sum(d) sum(e) / ((n-1)(n-2)) (debiased): n(n-3) times the
unbiased estimator of Song et al. 2012, whose Gram matrices lack their diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.blocks import centre_gram
from lightning_stitch.maths.rows import centred, check_varies, paired, rows
from lightning_stitch.settings import Estimator

_MIN_ROWS = {"debiased": 4, "biased": 2}  # n(n-3) must not be zero; a single row does not deviate from its mean
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
    x, y = paired(x, y)
    x, d, self_x = _prepared(x, "x", estimator)
    y, e, self_y = _prepared(y, "y", estimator)
    return _cka(_hsic(_cross_square(x, y), d @ e, d.sum(), e.sum(), len(x), estimator), self_x, self_y)


def cka_of_grams(x: Tensor, y: Tensor, *, estimator: Estimator = "debiased") -> Tensor:
    """`linear_cka` of two activations from their Gram matrices (rows x rows, float64), centred here."""
    x, y = centre_gram(x), centre_gram(y)
    _check_num_rows(len(x), estimator)
    for name, gram in (("x", x), ("y", y)):
        if not gram.diagonal().sum() > 0:
            raise CalibrationError(f"{name} is constant: its {len(gram)} rows are equal up to rounding.")
    d, e = x.diagonal(), y.diagonal()
    hsic = _hsic((x * y).sum(), d @ e, d.sum(), e.sum(), len(x), estimator)
    self_x = _self_similarity(x.square().sum(), d @ d, d.sum(), len(x), estimator, "x")
    self_y = _self_similarity(y.square().sum(), e @ e, e.sum(), len(y), estimator, "y")
    return _cka(hsic, self_x, self_y)


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
    z = torch.cat(paired(x, y), dim=1)
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
        check_varies(m.zz.diagonal()[part] / n, m.mean[part], n, name)
    xx, xy, yy = m.zz[:cut, :cut], m.zz[:cut, cut:], m.zz[cut:, cut:]
    d, e = xx.trace(), yy.trace()
    self_x = _self_similarity(xx.square().sum(), m.ss[0, 0], d, n, estimator, "x")
    self_y = _self_similarity(yy.square().sum(), m.ss[1, 1], e, n, estimator, "y")
    return _cka(_hsic(xy.square().sum(), m.ss[0, 1], d, e, n, estimator), self_x, self_y)


@dataclass(frozen=True, slots=True, eq=False)
class CentredRows:
    """One activation made ready to be scored against many.

    Its rows (n x channels, float32, centred in float64), their squared lengths (n,) and HSIC with itself, float64.
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

    def narrowed(self, first: int, last: int) -> RowBank:
        """The activations from one place up to, not including, another, without a copy."""
        part, channels = slice(first, last), slice(sum(self.widths[:first]), sum(self.widths[:last]))
        norms, similarity = self.squared_norms[part], self.self_similarity[part]
        return RowBank(self.columns[channels], self.widths[part], norms, similarity, self.estimator)


def centre_rows(x: Tensor, *, estimator: Estimator = "debiased", name: str = "x") -> CentredRows:
    """Centre an activation (rows x channels) once, for `cka_with_many` and `row_bank`; errors call it `name`.

    Raises:
        CalibrationError: As `linear_cka`, for this one activation.
    """
    x, d, similarity = _prepared(rows(x, name), name, estimator)
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


def _prepared(x: Tensor, name: str, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    _check_num_rows(len(x), estimator, name)
    x = centred(x, name)
    d = x.square().sum(1)
    return x, d, _self_similarity(_cross_square(x, x), d @ d, d.sum(), len(x), estimator, name)


def _check_num_rows(n: int, estimator: Estimator, name: str = "x and y") -> None:
    if estimator not in _MIN_ROWS:
        raise StitchError(f"There is no CKA estimator {estimator!r}; choose one of {list(_MIN_ROWS)}.")
    if n < _MIN_ROWS[estimator]:
        needed = f"{estimator.capitalize()} CKA needs at least {_MIN_ROWS[estimator]} rows"
        raise CalibrationError(f"{needed}; found {n} in {name}. Use more calibration images, or more rows of each.")


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
        reason = f"no two of its {n} rows have anything in common, as when they are too few"
        raise CalibrationError(f"{name} has no debiased similarity to itself: {reason}. Use more rows, or 'biased'.")
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
