"""Score a running network against all receivers of a step at once: one matrix product for each grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_stitch.cutting.graph import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io.activation_store import Carried
from lightning_stitch.maths.cka import RowBank, cka_with_many, row_bank
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.shortlist import Shortlist
from lightning_stitch.stitching.activations import Calibrated, Grid, centred_or_none, rows_on_grids


class Scorer:
    """The rows of all receivers, joined by grid.

    Args:
        sources: The sources with their calibration statistics.
        receivers: All (source, cut) index pairs; a receiver's number is its place in them.
        settings: How rows are sampled and scored.
        shortlist: Most receivers of one grid and class that are scored exactly at one step. Where there are more, those
            nearest by CKA on few rows are (`lightning_stitch.shortlist`).
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
