"""Linear CKA as a torchmetrics Metric: streamed over batches, merged over processes, thin over `functional`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths.cka import CKAMoments, cka_from_moments, cka_moments, merge_cka_moments
from lightning_stitch.settings import Estimator


class LinearCKA(Metric):
    """Linear CKA of two activations over all batches and processes: `linear_cka` of all their rows at once.

    The state is one float64 vector of centred moments (`CKAMoments`), about (x channels + y channels)^2 numbers however
    many rows there are; it is empty until the first `update` says how many channels there are. A process without rows
    takes part in the sum as nothing. `forward` returns the CKA of its batch alone, which then must have enough rows;
    call `update` where a batch may be shorter.

    Args:
        estimator: "debiased" needs 4 rows in all, "biased" (the StitchNet paper's) 2.
        **kwargs: As for every torchmetrics Metric.

    Example:
        >>> metric = LinearCKA()
        >>> x = torch.arange(10.0).reshape(5, 2) ** 2
        >>> metric.update(x[:3], 2 * x[:3])
        >>> metric.update(x[3:], 2 * x[3:])
        >>> round(metric.compute().item(), 6)
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    moments: Tensor

    def __init__(self, estimator: Estimator = "debiased", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.estimator = estimator
        self.add_state("moments", default=torch.zeros(0, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of rows.

        Args:
            x: n x channels, or maps n x channels x height x width (NCHW), of which every pixel is a row, ordered by
                image, height, width. Any real dtype.
            y: The same rows, which may have another number of channels.

        Raises:
            CalibrationError: If x or y is neither, is empty, has NaN or infinite values, or has other channels than the
                batches before, or if the numbers of rows differ.
        """
        self.moments = _merged(self.moments, _packed(cka_moments(_as_rows(x), _as_rows(y))))

    def compute(self) -> Tensor:
        """The CKA of all rows so far, a 0-dim float64 tensor.

        Raises:
            CalibrationError: If there are no rows or too few for the estimator, or x or y has the same values in all.
        """
        if not len(self.moments):
            raise CalibrationError("LinearCKA has no rows yet: call update(x, y) before compute().")
        return cka_from_moments(_unpacked(self.moments), estimator=self.estimator)

    # The two hooks below are torchmetrics' own (its MeanAveragePrecision overrides the first too): the defaults stack
    # states, which needs equal shapes, and a process or metric that has seen no rows has an empty one.

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        gathered: Sequence[Tensor] = dist_sync_fn(self.moments.double(), group=process_group or self.process_group)
        self.moments = reduce(_merged, gathered)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self.moments = _merged(incoming_state["moments"], self.moments)
        self._computed = None  # merge_state() leaves the value of before in the cache


def _as_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x


def _packed(moments: CKAMoments) -> Tensor:
    """The moments as one vector; whole numbers are exact in float64 up to 2^53."""
    counts = moments.mean.new_tensor([moments.num_rows, moments.x_channels, len(moments.mean)])
    return torch.cat([counts, moments.mean, moments.zz.flatten(), moments.sz.flatten(), moments.ss.flatten()])


def _unpacked(vector: Tensor) -> CKAMoments:
    num_rows, x_channels, c = (int(count) for count in vector[:3])
    shapes = ((c,), (c, c), (2, c), (2, 2))
    parts = vector[3:].split([prod(shape) for shape in shapes])
    return CKAMoments(num_rows, x_channels, *(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))


def _merged(first: Tensor, second: Tensor) -> Tensor:
    if not (len(first) and len(second)):
        return first if len(first) else second
    return _packed(merge_cka_moments(_unpacked(first), _unpacked(second)))
