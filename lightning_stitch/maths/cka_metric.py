"""Linear CKA as a torchmetrics Metric: of the rows of all batches and processes, thin over `linear_cka`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths.cka import linear_cka
from lightning_stitch.maths.rows import paired
from lightning_stitch.settings import Estimator


class LinearCKA(Metric):
    """Linear CKA of two activations over all batches and processes: `linear_cka` of all their rows at once.

    The state is these rows, in float32; a process without rows takes part as nothing. `forward` returns the CKA of its
    batch alone, which then must have enough rows; call `update` where a batch may be shorter.

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
    x: list[Tensor]
    y: list[Tensor]
    channels: Tensor

    def __init__(self, estimator: Estimator = "debiased", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.estimator = estimator
        # Flat, so that those of a process without rows, which knows no channels, can be gathered with the others.
        self.add_state("x", default=[], dist_reduce_fx="cat")
        self.add_state("y", default=[], dist_reduce_fx="cat")
        self.add_state("channels", default=torch.zeros(2, dtype=torch.long), dist_reduce_fx="max")

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
        x, y = (part.permute(0, 2, 3, 1).flatten(0, 2) if part.ndim == 4 else part for part in (x, y))
        x, y = paired(x, y)
        channels = self.channels.new_tensor([x.shape[1], y.shape[1]])
        if self.channels.any() and not self.channels.equal(channels):
            before, now = tuple(self.channels.tolist()), tuple(channels.tolist())
            raise CalibrationError(f"All batches must have the same channels (of x, of y); found {before} and {now}.")
        self.channels = channels
        self.x.append(x.float().flatten())
        self.y.append(y.float().flatten())

    def compute(self) -> Tensor:
        """The CKA of all rows so far, a 0-dim float64 tensor.

        Raises:
            CalibrationError: If there are no rows or too few for the estimator, or x or y has the same values in all.
        """
        if not self.channels.any():
            raise CalibrationError("LinearCKA has no rows yet: call update(x, y) before compute().")
        x, y = (
            dim_zero_cat(rows).view(-1, c) for rows, c in zip((self.x, self.y), self.channels.tolist(), strict=True)
        )
        return linear_cka(x, y, estimator=self.estimator)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the rows of another metric, or of its `metric_state`."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics leaves the value of before in the cache
