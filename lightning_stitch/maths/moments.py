"""Ridge regression at one known strength, by Cholesky factors: from rows, or from moments that rows join and leave.

Both give the map that `ridge_weights` gives at that strength, without eigenvalues, which cost five times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.maths.blocks import Scaling, block_factors, gram_of_rows, scale_of
from lightning_stitch.maths.decomposition import AffineMap
from lightning_stitch.maths.rows import THICK, portions

_CANCELLED = 1e-12  # a sum of squares that is a smaller share of the largest it has been is rounding error
_TINY = 1e-30  # where nothing varies there is nothing to predict from


def ridge_of_rows(
    features: Tensor, targets: Tensor, *, strength: float, blocks: Sequence[int] | None = None
) -> tuple[AffineMap, Tensor]:
    """The map of all rows (n x d to n x k), and each row as predicted from the others (n x k), from rows' Gram matrix.

    Arguments are `loo_ridge`'s; best where features outnumber rows. With C = K + lambda + mu 11'/n and any mu > 0, the
    residual of a row left out is (C^-1 (y - mean))_i / (C^-1_ii - 1 / (n (lambda + mu))).
    """
    n, d = features.shape
    scaling = scale_of(features, blocks)
    gram = gram_of_rows(features, scaling)
    trace = gram.trace().item()
    ridge, mu = max(strength * trace / min(n - 1, d), _TINY), max(trace / n, _TINY)
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.add_(mu / n)))
    mean = targets.mean(0)
    dual = inverse @ (targets - mean)
    left_out = targets - dual / (inverse.diagonal() - 1 / (n * (ridge + mu)))[:, None]
    parts = portions(d, n, fewest=THICK)
    weight = torch.cat([scaling(features, columns=part).T @ dual for part in parts]).T * scaling.factor
    return AffineMap(weight, mean - weight @ scaling.mean, None, None, ridge), left_out


@dataclass(slots=True, eq=False)
class RidgeMoments:
    """What ridge regression needs of rows x (d) and y (k), float64, centred; rows join and leave in place.

    Attributes:
        num_rows: How many rows there are.
        mean_x: (d,).
        mean_y: (k,).
        xx: Sum of the products of deviations from the means (d x d).
        xy: The same of x with y (d x k).
        largest: The largest that xx's diagonal has been (d,): what is left of it after rows left may be rounding.
    """

    num_rows: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    largest: Tensor

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> RidgeMoments:
        """Moments of rows (n x d, n x k)."""
        (d, k), zeros = (features.shape[1], targets.shape[1]), targets.double().new_zeros
        moments = cls(0, zeros(d), zeros(k), zeros(d, d), zeros(d, k), zeros(d))
        moments.add(features, targets)
        return moments

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Rows join."""
        for part in portions(*features.shape, fewest=THICK):
            self._move(features[part].double(), targets[part].double(), 1)

    def remove(self, features: Tensor, targets: Tensor) -> None:
        """Rows that had joined leave; some must stay."""
        for part in portions(*features.shape, fewest=THICK):
            self._move(features[part].double(), targets[part].double(), -1)

    def _move(self, x: Tensor, y: Tensor, sign: int) -> None:
        count, num_rows = sign * len(x), self.num_rows + sign * len(x)
        step_x, step_y = x.mean(0) - self.mean_x, y.mean(0) - self.mean_y
        # Of two groups' moments (Chan et al. 1983), the second of which counts negative where rows leave.
        root = (self.num_rows * len(x) / num_rows) ** 0.5
        x = torch.cat([x - x.mean(0), root * step_x[None]])
        y = torch.cat([y - y.mean(0), root * step_y[None]])
        self.xx.addmm_(x.T, x, alpha=sign)
        self.xy.addmm_(x.T, y, alpha=sign)
        self.mean_x += count / num_rows * step_x
        self.mean_y += count / num_rows * step_y
        self.num_rows = num_rows
        torch.maximum(self.largest, self.xx.diagonal(), out=self.largest)

    def scaling(self, blocks: Sequence[int] | None) -> Scaling:
        """`scale_of` the rows."""
        if blocks is None:
            return Scaling(self.mean_x, torch.ones_like(self.mean_x))
        squares = self.xx.diagonal()
        squares = torch.where(squares > _CANCELLED * self.largest, squares, torch.zeros_like(squares))
        return Scaling(self.mean_x, block_factors(self.mean_x, squares / self.num_rows, blocks))

    def solve(self, *, strength: float, blocks: Sequence[int] | None = None) -> MomentsRidge:
        """The regression of the rows at a strength, which `loo_ridge` explains; takes two matrices of d x d."""
        scaling = self.scaling(blocks)
        factor = scaling.factor
        gram = self.xx * factor
        gram *= factor[:, None]
        ridge = max(strength * gram.trace().item() / min(self.num_rows - 1, len(gram)), _TINY)
        gram.diagonal().add_(ridge)
        cholesky = torch.linalg.cholesky(gram)
        weight = torch.cholesky_solve(self.xy * factor[:, None], cholesky).T * factor
        bias = self.mean_y - weight @ self.mean_x
        return MomentsRidge(AffineMap(weight, bias, None, None, ridge), scaling, cholesky, self.num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class MomentsRidge:
    """A regression made of moments: the map of raw features, their scaling, and the Cholesky factor of Z'Z + lambda."""

    map: AffineMap
    scaling: Scaling
    cholesky: Tensor
    num_rows: int

    def predict_left_out(self, features: Tensor, targets: Tensor) -> Tensor:
        """Each of the rows that the moments are of, as predicted from the others (n x k), in portions."""
        predictions = []
        for part in portions(*features.shape, fewest=THICK):
            z, y = self.scaling(features, part), targets[part].double()
            lengths = torch.linalg.solve_triangular(self.cholesky, z.T, upper=False).square().sum(0)
            residual = y - self.map(features[part].double())
            predictions.append(y - residual / (1 - 1 / self.num_rows - lengths)[:, None])
        return torch.cat(predictions)
