"""Score a running network against all receivers of a step at once: one matrix product for each grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Carried
from lightning_stitch.maths import CentredRows, RowBank, cka_with_many, row_bank
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Grid, centred_or_none, rows_on_grids

MANY = 1024
"""More receivers than these are scored on a sketch first."""
_KEPT = 256  # of them, for the whole of the rows
_STRIDE = 8  # of the rows in a sketch


class Scorer:
    """The rows of all receivers, joined by grid; a receiver's number is its place in the (source, cut) index pairs.

    Of many receivers (`MANY`) all are scored on every eighth row, and the best 256 by that on all rows.
    """

    def __init__(
        self, sources: Sequence[Calibrated], receivers: Sequence[tuple[int, int]], settings: CalibrationSettings
    ) -> None:
        self.settings = settings
        self._centred: dict[Grid, list[CentredRows]] = {}
        self._places: dict[int, int] = {}
        self._names: dict[Grid, list[str]] = {}
        for number, (s, r) in enumerate(receivers):
            statistics = sources[s].statistics[r]
            if statistics.centred is not None:
                on_grid = self._centred.setdefault(statistics.cut.grid, [])
                self._places[number] = len(on_grid)
                on_grid.append(statistics.centred)
                names = self._names.setdefault(statistics.cut.grid, [])
                names.append(f"cut {statistics.cut.name!r} of source {sources[s].name!r}")
        self._banks: dict[Grid, RowBank] = {}
        self._sketches: dict[Grid, tuple[list[int], RowBank]] = {}

    @torch.inference_mode()
    def scores(
        self,
        activation: Carried,
        sender: Cut,
        admissible: Mapping[Grid, Sequence[int]],
        *,
        source: str,
        rejected: Counter[str],
    ) -> list[tuple[int, float]]:
        """Linear CKA of a cut's activation, of all calibration images, with receivers, as (receiver, CKA).

        `admissible` has by grid the receivers in question, in ascending order, none that does not vary. What is not
        scored is counted in `rejected` by reason. `source` is the sender's.

        Raises:
            CalibrationError: If a CKA overflows; names the cut and source of the values that are farthest from 1.
        """
        rows = rows_on_grids(activation, sender, admissible, self.settings)
        if rows is None:
            rejected["activation not finite"] += sum(map(len, admissible.values()))
            return []
        if are_many := sum(map(len, admissible.values())) > MANY:
            admissible = self._likely(rows, admissible, sender, rejected)
        scored: list[tuple[int, float]] = []
        for grid, receivers in admissible.items():
            try:
                centred = centred_or_none(rows[grid], self.settings, name=sender.name)
            except CalibrationError:
                # Rows that vary too little for a debiased estimate: such a stitch carries nothing.
                centred = None
            if centred is None:
                rejected["activation of the sender does not vary"] += len(receivers)
                continue
            places = [self._places[receiver] for receiver in receivers]
            if are_many:
                bank, numbers = row_bank([self._centred[grid][place] for place in places]), list(range(len(places)))
            else:
                if grid not in self._banks:
                    self._banks[grid] = row_bank(self._centred[grid])
                bank = self._banks[grid].narrowed(places[0], places[-1] + 1)
                numbers = [place - places[0] for place in places]
            try:
                ckas = cka_with_many(centred, bank).tolist()
            except CalibrationError as error:
                sizes = {f"cut {sender.name!r} of source {source!r}": float(centred.rows.abs().max())}
                sizes |= {self._names[grid][at]: float(self._centred[grid][at].rows.abs().max()) for at in places}
                name = max(sizes, key=lambda name: abs(math.log(sizes[name])) if sizes[name] else math.inf)
                raise CalibrationError(
                    f"{error} Those of {name} go up to {sizes[name]:.3g} from their mean."
                ) from error
            scored += [(receiver, ckas[number]) for receiver, number in zip(receivers, numbers, strict=True)]
        return scored

    def _likely(
        self,
        rows: Mapping[Grid, Tensor],
        admissible: Mapping[Grid, Sequence[int]],
        sender: Cut,
        rejected: Counter[str],
    ) -> dict[Grid, list[int]]:
        """The receivers that score best on a sketch; on grids of which a sketch says nothing, all."""
        likely: dict[Grid, list[int]] = {}
        sketched: list[tuple[float, int, Grid]] = []
        for grid, receivers in admissible.items():
            try:
                centred = centred_or_none(rows[grid][::_STRIDE], self.settings, name=sender.name)
                if grid not in self._sketches:
                    self._sketches[grid] = self._sketch(grid)
                known, bank = self._sketches[grid]
                ckas = [] if centred is None else cka_with_many(centred, bank).tolist()
            except CalibrationError:
                ckas = []
            found = dict(zip(known, ckas, strict=True)) if ckas else {}
            for receiver in receivers:
                if (cka := found.get(self._places[receiver])) is None:
                    likely.setdefault(grid, []).append(receiver)
                else:
                    sketched.append((cka, receiver, grid))
        sketched.sort(key=lambda entry: (-entry[0], entry[1]))
        for _, receiver, grid in sketched[:_KEPT]:
            likely.setdefault(grid, []).append(receiver)
        if dropped := len(sketched[_KEPT:]):
            rejected["not among the most alike in a sketch"] += dropped
        return {grid: sorted(receivers) for grid, receivers in likely.items()}

    def _sketch(self, grid: Grid) -> tuple[list[int], RowBank]:
        """Every eighth row of a grid's receivers; places of those that vary there, and their bank."""
        places, sketches = [], []
        for place, whole in enumerate(self._centred[grid]):
            try:
                part = centred_or_none(whole.rows[::_STRIDE], self.settings, name="sketch")
            except CalibrationError:
                continue
            if part is not None:
                places.append(place)
                sketches.append(part)
        return places, row_bank(sketches)
