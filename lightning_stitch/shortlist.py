"""Find the activations most like one among very many, before any of them is scored exactly.

Linear CKA is a cosine: of the two centred Gram matrices, written as vectors. Of few enough fixed rows these vectors are
short, so that one matrix-vector product compares a running network with every cut of a large pile of sources.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths.cka import centre_rows
from lightning_stitch.settings import Estimator


def gram_vector(rows: Tensor, *, estimator: Estimator = "debiased") -> Tensor:
    """The centred Gram matrix of an activation as a unit vector, float32.

    The dot product of two such vectors, of activations x and y on the same n rows, is `linear_cka(x, y)`. For the
    debiased estimator the matrix is U-centred (Szekely and Rizzo 2014), n (n - 1) / 2 entries; for the biased one
    doubly centred, n (n + 1) / 2.

    Args:
        rows: Rows x channels.
        estimator: Of CKA.

    Raises:
        CalibrationError: As `linear_cka`, for this one activation.
    """
    centred = centre_rows(rows, estimator=estimator)
    x, n = centred.rows.double(), len(rows)
    gram = x @ x.T
    if estimator == "biased":
        above = torch.triu_indices(n, n, 0)
        vector = gram[above[0], above[1]] * torch.where(above[0] == above[1], 1.0, 2**0.5)
    else:
        lengths = gram.diagonal()
        gram = gram + (lengths[:, None] + lengths) / (n - 2) - lengths.sum() / ((n - 1) * (n - 2))
        above = torch.triu_indices(n, n, 1)
        vector = gram[above[0], above[1]]
    return torch.nn.functional.normalize(vector, dim=0).float()


class Shortlist:
    """The Gram vectors of very many activations on the same rows.

    Args:
        activations: Their rows (rows x channels each), read one by one.
        num_rows: Most rows that are compared, evenly spread over those given: a vector has at most half the square of
            that many entries.
        estimator: Of CKA.

    Attributes:
        vectors: Activations x entries, float32.
    """

    def __init__(self, activations: Iterable[Tensor], *, num_rows: int = 96, estimator: Estimator = "debiased") -> None:
        self._num_rows = num_rows
        self._estimator: Estimator = estimator
        found = [self._vector_or_none(rows) for rows in activations]
        lengths = {len(vector) for vector in found if vector is not None}
        if len(lengths) != 1:
            raise CalibrationError("A shortlist takes one or more activations of the same rows, one of which varies.")
        nothing = torch.zeros(lengths.pop())
        self.vectors = torch.stack([nothing if vector is None else vector.cpu() for vector in found])

    def nearest(self, rows: Tensor, count: int) -> Tensor:
        """Indices of the `count` activations whose CKA with this one is highest on the compared rows, best first.

        Raises:
            CalibrationError: As `scores`.
        """
        return self.scores(rows).topk(min(count, len(self.vectors))).indices

    def scores(self, rows: Tensor) -> Tensor:
        """CKA of this activation with each on the compared rows, float32; 0 with one that does not vary there.

        Raises:
            CalibrationError: If the rows are not those of the others, or do not vary.
        """
        vector = self._vector(rows).cpu()
        if len(vector) != self.vectors.shape[1]:
            raise CalibrationError("The activation must have the rows of those that it is compared with.")
        return self.vectors @ vector

    def _vector_or_none(self, rows: Tensor) -> Tensor | None:
        try:
            return self._vector(rows)
        except CalibrationError:
            return None

    def _vector(self, rows: Tensor) -> Tensor:
        chosen = torch.linspace(0, len(rows) - 1, min(self._num_rows, len(rows)), device=rows.device).round().long()
        return gram_vector(rows[chosen], estimator=self._estimator)
