"""Score a running network against all receivers of a step at once: one matrix product for each grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Carried
from lightning_stitch.maths import RowBank, centre_rows, cka_with_many, row_bank
from lightning_stitch.settings import CalibrationSettings, Estimator
from lightning_stitch.stitching import Calibrated, Grid, centred_or_none, rows_on_grids


class Scorer:
    """The rows of all receivers, joined by grid.

    Args:
        sources: The sources with their calibration statistics.
        receivers: All (source, cut) index pairs; a receiver's number is its place in them.
        settings: How rows are sampled and scored.
        shortlist: Most receivers of one grid and class that are scored exactly at one step. Where there are more, those
            nearest by CKA on few rows are (`lightning_stitch.search.scoring`).
    """

    def __init__(
        self,
        sources: Sequence[Calibrated],
        receivers: Sequence[tuple[int, int]],
        settings: CalibrationSettings,
        *,
        shortlist: int,
    ) -> None:
        self.settings = settings
        self.shortlist = shortlist
        self._statistics = [sources[s].statistics[r] for s, r in receivers]
        self._members: dict[Grid, list[int]] = {}
        for number, statistics in enumerate(self._statistics):
            if statistics.centred is not None:
                self._members.setdefault(statistics.cut.grid, []).append(number)
        self._places = {number: place for found in self._members.values() for place, number in enumerate(found)}
        self._banks: dict[Grid, RowBank] = {}
        self._shortlists: dict[Grid, Shortlist] = {}

    @torch.inference_mode()
    def scores(
        self,
        activation: Carried,
        sender: Cut,
        admissible: Mapping[Grid, Sequence[int]],
        *,
        name: str,
        size_class: Callable[[int], int] | None = None,
        rejected: Counter[str],
    ) -> list[tuple[int, float]]:
        """Linear CKA of an activation with receivers, as (receiver, CKA).

        Args:
            activation: The sender's, of all calibration images.
            sender: Its cut.
            admissible: By grid the receivers in question, in ascending order; none that does not vary.
            name: What errors call the sender.
            size_class: Gives a receiver's class, each of which has a shortlist of its own; None: all are in one.
            rejected: Counts what is not scored, by reason.
        """
        rows = rows_on_grids(activation, sender, admissible, self.settings)
        if rows is None:
            rejected["activation not finite"] += sum(map(len, admissible.values()))
            return []
        scored: list[tuple[int, float]] = []
        for grid, receivers in admissible.items():
            try:
                centred = centred_or_none(rows[grid], self.settings, name=name)
            except CalibrationError:
                # Rows that vary too little for a debiased estimate: such a stitch carries nothing.
                centred = None
            if centred is None:
                rejected["activation of the sender does not vary"] += len(receivers)
                continue
            if len(receivers) > self.shortlist:
                near = self._nearest(grid, receivers, rows[grid], size_class)
                rejected["behind others on the shortlist"] += len(receivers) - len(near)
                ckas = cka_with_many(centred, self._joined(near)).tolist()
                scored += zip(near, ckas, strict=True)
                continue
            first, last = self._places[receivers[0]], self._places[receivers[-1]] + 1
            ckas = cka_with_many(centred, self._bank(grid).narrowed(first, last)).tolist()
            scored += [(receiver, ckas[self._places[receiver] - first]) for receiver in receivers]
        return scored

    def _bank(self, grid: Grid) -> RowBank:
        if grid not in self._banks:
            self._banks[grid] = self._joined(self._members[grid])
        return self._banks[grid]

    def _joined(self, receivers: Sequence[int]) -> RowBank:
        entries = [self._statistics[receiver].centred for receiver in receivers]
        return row_bank([entry for entry in entries if entry is not None])

    def _nearest(
        self, grid: Grid, receivers: Sequence[int], rows: Tensor, size_class: Callable[[int], int] | None
    ) -> list[int]:
        """Of each class the receivers that are nearest on few rows, as many as are scored exactly."""
        if grid not in self._shortlists:
            pile = (self._statistics[receiver].rows for receiver in self._members[grid])
            self._shortlists[grid] = Shortlist(pile, estimator=self.settings.estimator)
        try:
            scores = self._shortlists[grid].scores(rows).tolist()
        except CalibrationError:
            # It does not vary on those few rows: all are scored.
            return list(receivers)
        classes: dict[int, list[tuple[float, int]]] = {}
        for receiver in receivers:
            kind = size_class(receiver) if size_class else 0
            classes.setdefault(kind, []).append((-scores[self._places[receiver]], receiver))
        return sorted(receiver for found in classes.values() for _, receiver in sorted(found)[: self.shortlist])


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
