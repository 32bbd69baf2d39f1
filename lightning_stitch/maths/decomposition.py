"""Ridge regression's decomposition: rows Z = U diag(sqrt(s)) V', from the smaller of Z'Z and ZZ', in portions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.maths.blocks import Scaling, centre_gram, gram_of_features, gram_of_rows
from lightning_stitch.maths.rows import THICK, portions

_EPS = torch.finfo(torch.float64).eps


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


@dataclass(frozen=True, slots=True, eq=False)
class RidgeProblem:
    """Z (n x d, of `features` by their `scaling`) = U diag(sqrt(eigenvalues)) V', r eigenvalues that are not rounding.

    Attributes:
        features: Raw rows, of any real dtype; None: only their Gram matrix was known.
        scaling: What makes Z of them; None likewise.
        mean_y: (k,) that was taken from the targets y; zero, like the scaling's mean, where nothing is centred.
        eigenvalues: (r,), float64, ascending.
        vectors: U (n x r) if `wide`, else V (d x r).
        projected: U'(y - mean_y), r x k.
        wide: Whether there are no more rows than features.
    """

    features: Tensor | None
    scaling: Scaling | None
    mean_y: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    projected: Tensor
    wide: bool

    def basis(self, rows: slice) -> Tensor:
        """Some rows of U."""
        if self.wide:
            return self.vectors[rows]
        features, scaling = self._whole()
        return scaling(features, rows) @ self.vectors / self.eigenvalues.sqrt()

    def map_at(self, ridge: float, *, bias: bool = True) -> AffineMap:
        """The map of raw features that minimises ||Z A - Y||_F^2 + ridge ||A||_F^2."""
        _, scaling = self._whole()
        s = self.eigenvalues
        weight = (self._back(self.projected / (s + ridge)[:, None]) * scaling.factor[:, None]).T
        condition = ((s[-1] + ridge) / (s[0] + ridge)).item() if len(s) else 1.0
        return AffineMap(weight, self.mean_y - weight @ scaling.mean if bias else None, len(s), condition, ridge)

    def contributions_at(self, ridge: float) -> Tensor:
        """Of each feature (d,): the sum over columns of its part's covariance with the prediction, times n."""
        s = self.eigenvalues[:, None]
        fitted = s * self.projected / (s + ridge)  # U' of the predictions
        weight, along = self._back(torch.cat([self.projected / (s + ridge), fitted], dim=1)).chunk(2, dim=1)
        return (weight * along).sum(1)

    def _back(self, coefficients: Tensor) -> Tensor:
        """Z' U c (d x k) of coefficients c (r x k)."""
        features, scaling = self._whole()
        if not self.wide:
            return self.vectors @ (self.eigenvalues.sqrt()[:, None] * coefficients)
        dual = self.vectors @ coefficients
        parts = portions(features.shape[1], len(features), fewest=THICK)
        return torch.cat([scaling(features, columns=part).T @ dual for part in parts])

    def _whole(self) -> tuple[Tensor, Scaling]:
        if self.features is None or self.scaling is None:
            raise StitchError("A Gram matrix of rows gives no weights: fit them on the rows (`loo_ridge`).")
        return self.features, self.scaling


def decompose(features: Tensor, targets: Tensor, scaling: Scaling, *, centred: bool = True) -> RidgeProblem:
    """The problem of regressing targets (n x k) on scaled features (n x d), whose mean is their rows' if `centred`."""
    n, d = features.shape
    wide = n <= d
    y = targets.double()
    mean_y = y.mean(0) if centred else y.new_zeros(y.shape[1])
    gram = gram_of_rows(features, scaling) if wide else gram_of_features(features, scaling)
    # Centred rows have no direction along which all are equal.
    eigenvalues, vectors = _spectrum(gram, max(n, d), fewest_zero=int(wide and centred))
    if wide:
        projected = vectors.T @ (y - mean_y)
    else:
        zy = y.new_zeros(d, y.shape[1])
        for part in portions(n, d, fewest=THICK):
            zy.addmm_(scaling(features, part).T, y[part] - mean_y)
        projected = vectors.T @ zy / eigenvalues.sqrt()[:, None]
    return RidgeProblem(features, scaling, mean_y, eigenvalues, vectors, projected, wide)


def decompose_gram(gram: Tensor, targets: Tensor) -> RidgeProblem:
    """The problem of regressing targets (n x k) on rows with a Gram matrix (n x n), which is centred here."""
    y = targets.double()
    eigenvalues, vectors = _spectrum(centre_gram(gram), len(gram), fewest_zero=1)
    mean_y = y.mean(0)
    return RidgeProblem(None, None, mean_y, eigenvalues, vectors, vectors.T @ (y - mean_y), wide=True)


def _spectrum(gram: Tensor, longest: int, *, fewest_zero: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and their vectors, without those that are rounding."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    first = int((eigenvalues <= eigenvalues[-1] * longest * _EPS).sum())
    first = max(first, fewest_zero)
    return eigenvalues[first:], vectors[:, first:]
