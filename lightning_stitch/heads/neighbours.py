"""The k-nearest-neighbour head: labelled images vote, those that are most similar count most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads.targets import Task, standardised, target_columns

Metric = Literal["cosine", "euclidean"]

_NUMBERS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80)
_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ROWS_AT_ONCE = 1024


class NearestNeighbourHead(nn.Module):
    """What the most similar of the labelled images say, empty until `fit_neighbour_head` or a state dict fills it.

    Features are standardised by the labelled images' means and deviations. The similarity s of two rows of d features
    is their cosine, or -|x - y|^2 / 2d, which is of the same scale. The k most similar images weigh exp(s / t), the
    weights summing to one (as in Wu et al. 2018, "Unsupervised feature learning via non-parametric instance
    discrimination"), and their targets are averaged. Averages p of classes and labels become (log-)odds of
    (n p + prior) / (n + 1), n labelled images, so that none is infinite; the prior is one over the number of classes,
    or one half for a label.

    It has no parameters: in training only the network before it moves, and the labelled images' features stay.

    Attributes:
        rows: Buffer (images x in_features): the labelled images' standardised features, float32.
        targets: Buffer (images x num_classes): what they are, float32.
        mean: Buffer (in_features,): subtracted from features.
        deviation: Buffer (in_features,): divides them.
        num_neighbours: Buffer (), int64: how many images vote.
        temperature: Buffer (): how much more the nearest count; the lower, the more.

    Args:
        in_features: Features that come in.
        num_classes: Log-probabilities, logits or numbers that go out.
        task: What the targets are.
        metric: "cosine" or "euclidean".

    Raises:
        StitchError: If the metric is unknown.
    """

    rows: Tensor
    targets: Tensor
    mean: Tensor
    deviation: Tensor
    num_neighbours: Tensor
    temperature: Tensor

    def __init__(
        self, in_features: int, num_classes: int, *, task: Task = "multiclass", metric: Metric = "cosine"
    ) -> None:
        super().__init__()
        if metric not in get_args(Metric):
            raise StitchError(f"metric must be one of {get_args(Metric)}; found {metric!r}.")
        self.task: Task = task
        self.metric: Metric = metric
        self.register_buffer("rows", torch.zeros(0, in_features))
        self.register_buffer("targets", torch.zeros(0, num_classes))
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))
        self.register_buffer("num_neighbours", torch.tensor(0))
        self.register_buffer("temperature", torch.tensor(1.0))
        self._k = 0

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities of classes, logits of labels, or numbers (n x num_classes) of features (n x in_features).

        Raises:
            StitchError: If it is empty.
        """
        if not self._k:
            raise StitchError("This k-nearest-neighbour head holds no images yet: fit it, or load a state dict.")
        similarity = _similarity((features - self.mean) / self.deviation, self.rows, self.metric)
        nearest, who = similarity.topk(self._k, dim=1)
        weights = (nearest / self.temperature).softmax(dim=1)
        average = (weights[:, :, None] * self.targets[who]).sum(1)
        return _outputs(average, self.task, len(self.rows))

    def extra_repr(self) -> str:
        """Sizes and metric, for printing."""
        return f"in_features={len(self.mean)}, num_classes={self.targets.shape[1]}, rows={len(self.rows)}, k={self._k}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take as many rows as the state dict has: nothing else knows how many images were labelled."""
        for name in ("rows", "targets"):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == own.shape[1]:
                setattr(self, name, own.new_zeros(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._k = int(self.num_neighbours)


@dataclass(frozen=True, slots=True)
class NeighbourFit:
    """How a k-nearest-neighbour head does on rows left out, one at a time; their features' scale apart.

    Number and temperature were chosen on the same rows, so the figures are a little optimistic.

    Attributes:
        num_neighbours: How many rows vote.
        temperature: How much more the nearest count.
        loo_accuracy: Share of rows whose class has most votes; None but for classes.
        loo_r2: Share of the targets' variance that the averages explain; of several numbers it is the mean over them.
        loo_log_loss: Mean of -log(probability) in nats of a row's class, or of its labels; None for numbers.
        num_rows: Rows of the fit.
    """

    num_neighbours: int
    temperature: float
    loo_accuracy: float | None
    loo_r2: float
    loo_log_loss: float | None
    num_rows: int


@torch.no_grad()
def fit_neighbour_head(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    task: Task = "multiclass",
    metric: Metric = "cosine",
    num_neighbours: int | None = None,
    temperature: float | None = None,
) -> tuple[NearestNeighbourHead, NeighbourFit]:
    """Put labelled rows in a k-nearest-neighbour head; how many vote, and how sharply, is chosen by leave-one-out.

    What has the least leave-one-out log-loss (of numbers: squared error, standardised) is taken, of 1 to 80 neighbours
    and temperatures from 0.01 to 1. Deterministic; float32, on the features' device.

    Args:
        features: Rows x features, any real dtype.
        targets: Of the task, as `fit_ridge_head` takes them.
        num_classes: Classes, labels or numbers.
        task: "multiclass", "multilabel" or "regression".
        metric: "cosine" or "euclidean".
        num_neighbours: How many rows vote; None: chosen.
        temperature: How much more the nearest count; None: chosen.

    Returns:
        The head, and what leave-one-out says of it.

    Raises:
        CalibrationError: If features or targets cannot be used (as `fit_ridge_head`), or fewer than 2 rows, or no more
            than `num_neighbours`, are there.
        StitchError: If an option is out of range.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.1], [0.9, 0.0]])
        >>> head, fit = fit_neighbour_head(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> head(torch.tensor([[0.2, 0.7]])).argmax(1).item()
        0
    """
    columns = target_columns(targets, task=task, num_classes=num_classes).to(features.device)
    _check(features, columns, num_neighbours, temperature)
    with torch.inference_mode(False), torch.no_grad():
        head = NearestNeighbourHead(features.shape[1], num_classes, task=task, metric=metric).to(features.device)
        z, mean, deviation = standardised(features.double())
        head.rows, head.targets = z.float(), columns.float()
        head.mean, head.deviation = mean.float(), deviation.float()
        fit = _chosen(head, columns, num_neighbours, temperature)
        head.num_neighbours.fill_(fit.num_neighbours)
        head.temperature.fill_(fit.temperature)
        head._k = fit.num_neighbours
    return head, fit


def _check(features: Tensor, columns: Tensor, num_neighbours: int | None, temperature: float | None) -> None:
    if num_neighbours is not None and num_neighbours < 1:
        raise StitchError(f"num_neighbours must be at least 1; found {num_neighbours}.")
    if temperature is not None and not 0 < temperature < torch.inf:
        raise StitchError(f"temperature must be a positive finite number; found {temperature}.")
    if features.ndim != 2 or len(features) != len(columns):
        raise CalibrationError(
            f"Each row needs one target; found features of shape {tuple(features.shape)} and {len(columns)} targets."
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise CalibrationError(f"features has NaN or infinite values in {bad} of its {len(features)} rows.")
    need = 2 if num_neighbours is None else num_neighbours + 1
    if len(features) < need:
        raise CalibrationError(
            f"Leaving one row out, so that {need - 1} others vote, needs at least {need} rows; found {len(features)}."
        )


def _chosen(
    head: NearestNeighbourHead, columns: Tensor, num_neighbours: int | None, temperature: float | None
) -> NeighbourFit:
    n = len(columns)
    numbers = [k for k in _NUMBERS if k < n] if num_neighbours is None else [num_neighbours]
    nearest, who = _nearest_others(head, numbers[-1])
    # Numbers in units of their own must not decide by their size.
    scaled = standardised(columns)[0] if head.task == "regression" else columns
    told = scaled[who]
    best: tuple[float, int, float, Tensor] | None = None
    for k in numbers:
        for t in _TEMPERATURES if temperature is None else [temperature]:
            average = ((nearest[:, :k] / t).softmax(1)[:, :, None] * told[:, :k]).sum(1)
            loss = _loss(average, scaled, head.task)
            if best is None or loss < best[0]:
                best = (loss, k, t, average)
    assert best is not None
    loss, k, t, average = best
    classes = head.task == "multiclass"
    error = (average - scaled).square().sum()
    return NeighbourFit(
        num_neighbours=k,
        temperature=t,
        loo_accuracy=(average.argmax(1) == columns.argmax(1)).double().mean().item() if classes else None,
        loo_r2=1 - (error / (scaled - scaled.mean(0)).square().sum()).item(),
        loo_log_loss=None if head.task == "regression" else loss,
        num_rows=n,
    )


def _nearest_others(head: NearestNeighbourHead, k: int) -> tuple[Tensor, Tensor]:
    """Similarities (rows x k), float64, to each row's k nearest others, and which they are."""
    values, indices = [], []
    for start in range(0, len(head.rows), _ROWS_AT_ONCE):
        block = head.rows[start : start + _ROWS_AT_ONCE]
        similarity = _similarity(block, head.rows, head.metric)
        own = torch.arange(len(block), device=block.device)
        similarity[own, own + start] = -torch.inf
        top = similarity.topk(k, dim=1)
        values.append(top.values.double())
        indices.append(top.indices)
    return torch.cat(values), torch.cat(indices)


def _similarity(x: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    if metric == "cosine":
        return F.normalize(x, dim=1) @ F.normalize(rows, dim=1).T
    squared = x.square().sum(1)[:, None] - 2 * x @ rows.T + rows.square().sum(1)
    return -squared.clamp_min(0) / (2 * x.shape[1])


def _outputs(average: Tensor, task: Task, num_rows: int) -> Tensor:
    if task == "regression":
        return average
    prior = 0.5 if task == "multilabel" else 1 / average.shape[1]
    # Weights that sum to one up to rounding could otherwise give a label a probability above one.
    p = (num_rows * average.clamp(0, 1) + prior) / (num_rows + 1)
    return p.log() if task == "multiclass" else p.logit()


def _loss(average: Tensor, columns: Tensor, task: Task) -> float:
    if task == "regression":
        return (average - columns).square().mean().item()
    outputs = _outputs(average, task, len(columns) - 1)
    if task == "multiclass":
        return F.cross_entropy(outputs, columns.argmax(1)).item()
    return F.binary_cross_entropy_with_logits(outputs, columns).item()
