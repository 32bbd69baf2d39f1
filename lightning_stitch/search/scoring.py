"""Score a running network against all receivers of a step at once: one matrix product for each grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Carried
from lightning_stitch.maths import CentredRows, RowBank, cka_with_many, row_bank
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Grid, centred_or_none, rows_on_grids


class Scorer:
    """The rows of all receivers, joined by grid; a receiver's number is its place in the (source, cut) index pairs."""

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
            if grid not in self._banks:
                self._banks[grid] = row_bank(self._centred[grid])
            places = [self._places[receiver] for receiver in receivers]
            try:
                ckas = cka_with_many(centred, self._banks[grid].narrowed(places[0], places[-1] + 1)).tolist()
            except CalibrationError as error:
                sizes = {f"cut {sender.name!r} of source {source!r}": float(centred.rows.abs().max())}
                sizes |= {self._names[grid][at]: float(self._centred[grid][at].rows.abs().max()) for at in places}
                name = max(sizes, key=lambda name: abs(math.log(sizes[name])) if sizes[name] else math.inf)
                raise CalibrationError(
                    f"{error} Those of {name} go up to {sizes[name]:.3g} from their mean."
                ) from error
            scored += [(receiver, ckas[place - places[0]]) for receiver, place in zip(receivers, places, strict=True)]
        return scored
