"""A ridge head whose labelled rows come and go: what a refit on the same rows gives, without a refit from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads.ridge import RidgeFit, RidgeHead, fit_ridge_head, linear_head
from lightning_stitch.heads.score_calibration import Calibration, calibrate
from lightning_stitch.heads.targets import Task, target_columns
from lightning_stitch.maths import AffineMap, RidgeMoments, check_pair, ridge_of_rows

_TASKS: tuple[Task, ...] = get_args(Task)
_MOMENTS = tuple(field.name for field in fields(RidgeMoments))


class RidgeLearner:
    """Labelled rows that come and go, and the head that `fit_ridge_head` would fit on those there are.

    `update` and `forget` keep the books; `head` is made when it is next asked for. Its numbers are those of
    `fit_ridge_head` on the same rows at the same strength (to 1e-6): the scaling of blocks, lambda and the calibration
    follow every row. The strength stays until `refit`.

    A head of n rows of d features takes, if n <= d, the rows' Gram matrix anew, O(n^2 d), as every row moves every
    feature's deviation, and one Cholesky factor, O(n^3). If n > d, sums of products are kept, to which a row adds in
    O(d^2); a head takes O(d^3), and O(n d^2) for the leave-one-out scores on which classes and labels are calibrated.

    Memory: the rows as they came (by reference until others join) and their targets; if n > d, d x d numbers in float64
    besides; without rows kept, only these. A head takes up to three matrices of min(n, d)^2 in float64 for a moment.

    Attributes:
        num_classes: Classes, labels or numbers.
        task: "multiclass", "multilabel" or "regression".
        blocks: Widths of blocks of features, or None.
        strength: The ridge strength (`loo_ridge` has its scale).

    Args:
        features: The first rows, rows x features, any real dtype.
        targets: Their targets, as `fit_ridge_head` takes them.
        num_classes: Classes, labels or numbers.
        task: "multiclass", "multilabel" or "regression".
        blocks: Widths of consecutive blocks of features that count alike; None: features count as they are.
        strength: The ridge strength; None: chosen of `DEFAULT_STRENGTHS` by leave-one-out.
        keep_rows: False: rows and targets are summed and not kept. Then classes and labels stay calibrated as the first
            rows were, the strength is not chosen anew, and rows are forgotten by their features and targets.

    Raises:
        CalibrationError: As `fit_ridge_head`.
        StitchError: As `fit_ridge_head`.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
        >>> learner = RidgeLearner(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)
        >>> learner.update(torch.tensor([[0.6], [0.7]]), torch.tensor([0, 0]))
        >>> learner.forget(torch.tensor([0, 3]))
        >>> learner.num_rows, learner.head(torch.tensor([[0.3], [0.95]])).argmax(1).tolist()
        (6, [0, 1])
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        *,
        num_classes: int,
        task: Task = "multiclass",
        blocks: Sequence[int] | None = None,
        strength: float | None = None,
        keep_rows: bool = True,
    ) -> None:
        self.num_classes, self.task, self.blocks = num_classes, task, None if blocks is None else tuple(blocks)
        self._rows: _Rows | None = _Rows(features.detach(), targets.detach().to(features.device))
        self._moments: RidgeMoments | None = None
        self._calibration: Calibration | None = None
        self._head: RidgeHead | None = None
        self.refit(strength)
        if not keep_rows:
            self._calibration = self._solved(self._rows)[1]
            self._moments = RidgeMoments.of(features, self._columns(self._rows.targets))
            self._rows = None
        self._keep_the_smaller()

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self._rows.features) if self._rows is not None else self._sums.num_rows

    @property
    @torch.inference_mode(False)
    @torch.no_grad()
    def head(self) -> RidgeHead:
        """The head of the rows there are, on their device: one object until rows or strength change.

        Raises:
            CalibrationError: Where rows are kept, as `fit_ridge_head`: when all that are left are of one class, say.
        """
        if self._head is None:
            self._head = linear_head(*self._solved(self._rows))
        return self._head

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add labelled rows (rows x features), of which all may have one target.

        Raises:
            CalibrationError: If features have another width, or NaN or infinite values, or targets do not fit.
        """
        columns = self._checked(features, targets)
        if self._moments is not None:
            self._moments.add(features, columns)
        if self._rows is not None:
            self._rows = self._rows.joined(features.detach(), targets.detach())
        self._head = None
        self._keep_the_smaller()

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """Take rows out again.

        Args:
            rows: Their places (k,), integers from 0 in the order in which rows joined; those behind them move up. Where
                rows are not kept: their features, which nothing checks to have joined.
            targets: Where rows are not kept, the targets with which they joined.

        Raises:
            CalibrationError: If fewer than two rows would be left, or as `update`.
            StitchError: If a place is not there or named twice, or rows are not named as they must be.
        """
        if (count := self.num_rows - len(rows)) < 2:
            raise CalibrationError(f"A head needs at least 2 rows; {max(count, 0)} of {self.num_rows} would be left.")
        if self._rows is None:
            if targets is None:
                raise StitchError("Rows were not kept (keep_rows=False): forget them by their features and targets.")
            self._sums.remove(rows, self._checked(rows, targets))
        else:
            if targets is not None:
                raise StitchError("Rows are kept, so they are forgotten by their places alone; found targets as well.")
            leaving = _at_places(rows, self.num_rows)
            if self._moments is not None:
                gone = self._rows.where(leaving)
                self._moments.remove(gone.features, self._columns(gone.targets))
            self._rows = self._rows.where(~leaving)
        self._head = None
        self._keep_the_smaller()

    def refit(self, strength: float | None = None) -> RidgeFit | None:
        """Choose the strength anew by leave-one-out, or set it.

        Returns:
            What leave-one-out says at this strength; None where rows are not kept.

        Raises:
            CalibrationError: As `fit_ridge_head`.
            StitchError: If the strength is not a positive finite number, or is to be chosen and rows are not kept.
        """
        if self._rows is not None:
            strengths = None if strength is None else [strength]
            options: dict[str, Any] = {"num_classes": self.num_classes, "task": self.task, "blocks": self.blocks}
            self._head, fit = fit_ridge_head(*self._rows, strengths=strengths, **options)
            self.strength = fit.strength
            return fit
        if strength is None or not 0 < strength < torch.inf:
            needed = "Where rows are not kept (keep_rows=False), refit needs a strength, a positive finite number"
            raise StitchError(f"{needed}; found {strength}.")
        self.strength, self._head = strength, None
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as contiguous tensors, as safetensors keeps them; `from_state_dict` reads it."""
        state = {
            "strength": torch.tensor(self.strength, dtype=torch.float64),
            "num_classes": torch.tensor(self.num_classes),
            "task": torch.tensor(_TASKS.index(self.task)),
            "blocks": torch.tensor(self.blocks or (), dtype=torch.int64),
        }
        if self._rows is not None:
            state |= self._rows._asdict()
        if self._moments is not None:
            state |= {name: torch.as_tensor(getattr(self._moments, name)) for name in _MOMENTS}
        if self._calibration is not None:
            state |= {"factor": self._calibration.factor, "offset": self._calibration.offset}
        return {name: value.contiguous() for name, value in state.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> RidgeLearner:
        """The learner whose state it is; tensors are not copied, and those of sums change with it.

        Raises:
            StitchError: If something is missing.
        """
        missing = {"strength", "num_classes", "task", "blocks"} - set(state)
        kept = set(_Rows._fields) <= set(state)
        if missing or not (kept or {*_MOMENTS, "factor", "offset"} <= set(state)):
            raise StitchError(f"This is not all of a RidgeLearner's state; found {sorted(state)}.")
        self = cls.__new__(cls)
        self.strength, self.num_classes = state["strength"].item(), int(state["num_classes"])
        self.task, self.blocks = _TASKS[int(state["task"])], tuple(state["blocks"].tolist()) or None
        self._rows = _Rows(state["features"], state["targets"]) if kept else None
        self._calibration = None if kept else Calibration(state["factor"], state["offset"], None, None, None)
        self._moments = self._head = None
        if "xx" in state:
            num_rows, *sums = (state[name] for name in _MOMENTS)
            self._moments = RidgeMoments(int(num_rows), *sums)
        return self

    @property
    def _sums(self) -> RidgeMoments:
        assert self._moments is not None  # where no rows are kept
        return self._moments

    def _solved(self, rows: _Rows | None) -> tuple[AffineMap, Calibration]:
        """The regression of the rows there are, and the calibration of its scores."""
        options: dict[str, Any] = {"strength": self.strength, "blocks": self.blocks}
        if rows is None:
            assert self._calibration is not None
            return self._sums.solve(**options).map, self._calibration
        columns = self._columns(rows.targets, varied=True)
        if self._moments is None:
            solution, scores = ridge_of_rows(rows.features, columns, **options)
        else:
            solved = self._moments.solve(**options)
            # Numbers are not calibrated, so nobody asks for their scores.
            scores = columns if self.task == "regression" else solved.predict_left_out(rows.features, columns)
            solution = solved.map
        return solution, calibrate(scores, columns, task=self.task)

    def _columns(self, targets: Tensor, *, varied: bool = False) -> Tensor:
        return target_columns(targets, task=self.task, num_classes=self.num_classes, varied=varied)

    def _checked(self, features: Tensor, targets: Tensor) -> Tensor:
        """Columns of the targets of rows that join or leave, once both are known to fit."""
        columns = self._columns(targets).to(features.device)
        check_pair(features, columns, ("features", "targets"))
        width = self._rows.features.shape[1] if self._rows is not None else len(self._sums.mean_x)
        if features.shape[1] != width:
            raise CalibrationError(f"Rows must have {width} features, as the first; found {features.shape[1]}.")
        return columns

    def _keep_the_smaller(self) -> None:
        """Sums of products where features are fewer than rows; else the rows alone."""
        if self._rows is not None:
            n, d = self._rows.features.shape
            if n <= d:
                self._moments = None
            elif self._moments is None:
                self._moments = RidgeMoments.of(self._rows.features, self._columns(self._rows.targets))


class _Rows(NamedTuple):
    features: Tensor
    targets: Tensor

    def joined(self, features: Tensor, targets: Tensor) -> _Rows:
        return _Rows(torch.cat([self.features, features]), torch.cat([self.targets, targets.to(self.targets.device)]))

    def where(self, mask: Tensor) -> _Rows:
        return _Rows(self.features[mask], self.targets[mask])


def _at_places(places: Tensor, num_rows: int) -> Tensor:
    """Which rows are named (num_rows,), bool."""
    if places.ndim != 1 or places.is_floating_point() or places.dtype == torch.bool:
        needed = "Rows are kept, so they are forgotten by their places, integers (k,)"
        raise StitchError(f"{needed}; found {places.dtype} of shape {tuple(places.shape)}.")
    listed = places.tolist()
    if len(set(listed)) < len(listed) or not all(0 <= place < num_rows for place in listed):
        raise StitchError(f"Places must differ and lie from 0 to {num_rows - 1}; found {listed[:20]}.")
    mask = torch.zeros(num_rows, dtype=torch.bool, device=places.device)
    mask[places.long()] = True
    return mask
