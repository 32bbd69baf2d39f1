"""The k-nearest-neighbour head: labelled images vote, those that are most similar count most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads.targets import Task, standardised, target_columns
from lightning_stitch.maths import check_pair, portions, scale_of

Metric = Literal["cosine", "euclidean"]

_NUMBERS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80)
_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ROWS_AT_ONCE = 1024


class NearestNeighbourHead(nn.Module):
    """What the most similar of the labelled images say, empty until `fit_neighbour_head` or a state dict fills it.

    Features are standardised by the labelled images' means and deviations; of several blocks of features each is scaled
    so that all count alike and the mean square of a feature stays 1. The similarity s of two rows of d features
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
        factor: Buffer (in_features,): multiplies them; 0 where a feature does not vary.
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
    factor: Tensor
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
        self.register_buffer("factor", torch.ones(in_features))
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
        similarity = _similarity((features - self.mean) * self.factor, self.rows, self.metric)
        nearest = similarity.topk(self._k, dim=1)
        weights = (nearest.values / self.temperature).softmax(dim=1)
        average = (weights[:, :, None] * self.targets[nearest.indices]).sum(1)
        return _outputs(average, self.task, len(self.rows))

    def extra_repr(self) -> str:
        """Sizes and metric, for printing."""
        return f"in_features={len(self.mean)}, num_classes={self.targets.shape[1]}, rows={len(self.rows)}, k={self._k}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take as many rows as the state dict has: nothing else knows how many images were labelled."""
        for name in ("rows", "targets"):
            buffer, saved = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.ndim == 2 and saved.shape[1] == buffer.shape[1]:
                setattr(self, name, buffer.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._k = int(self.num_neighbours)


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
    blocks: Sequence[int] | None = None,
) -> NearestNeighbourHead:
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
        blocks: Widths of consecutive blocks of features that are to count alike in similarities, however wide each is
            (`fit_ridge_head`); None: every feature counts alike.

    Raises:
        CalibrationError: If features or targets cannot be used (as `fit_ridge_head`), or fewer than 2 rows, or no more
            than `num_neighbours`, are there.
        StitchError: If an option is out of range, or blocks are not widths that sum to the features' number.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.1], [0.9, 0.0]])
        >>> head = fit_neighbour_head(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> head(torch.tensor([[0.2, 0.7]])).argmax(1).item()
        0
    """
    columns = target_columns(targets, task=task, num_classes=num_classes).to(features.device)
    if num_neighbours is not None and num_neighbours < 1:
        raise StitchError(f"num_neighbours must be at least 1; found {num_neighbours}.")
    if temperature is not None and not 0 < temperature < torch.inf:
        raise StitchError(f"temperature must be a positive finite number; found {temperature}.")
    check_pair(features, columns, ("features", "targets"))
    voters = 1 if num_neighbours is None else num_neighbours
    if len(features) <= voters:
        needed = f"Leaving one row out, so that {voters} others vote, needs at least {voters + 1} rows"
        raise CalibrationError(f"{needed}; found {len(features)}.")
    with torch.inference_mode(False), torch.no_grad():
        head = NearestNeighbourHead(features.shape[1], num_classes, task=task, metric=metric).to(features.device)
        blocks = [features.shape[1]] if blocks is None else blocks
        scaling = scale_of(features, blocks)
        scale = math.sqrt(features.shape[1] / len(blocks))  # makes the mean square of a feature 1 again
        parts = portions(*features.shape)
        head.rows = torch.cat([(scaling(features, part) * scale).float() for part in parts])
        head.targets = columns.float()
        head.mean, head.factor = scaling.mean.float(), (scaling.factor * scale).float()
        head._k, best_temperature = _least_loss(head, columns, num_neighbours, temperature)
        head.num_neighbours.fill_(head._k)
        head.temperature.fill_(best_temperature)
    return head


def _least_loss(
    head: NearestNeighbourHead, columns: Tensor, num_neighbours: int | None, temperature: float | None
) -> tuple[int, float]:
    """Number of neighbours and temperature of the least leave-one-out loss."""
    numbers = [k for k in _NUMBERS if k < len(columns)] if num_neighbours is None else [num_neighbours]
    temperatures = _TEMPERATURES if temperature is None else (temperature,)
    if head.task == "regression":  # in units of their own, numbers must not decide by their size
        columns = standardised(columns)[0]
    similarity, neighbours = _nearest_others(head, numbers[-1])
    targets = columns[neighbours]

    def loss(k: int, t: float) -> float:
        average = ((similarity[:, :k] / t).softmax(1)[:, :, None] * targets[:, :k]).sum(1)
        return _loss(average, columns, head.task)

    return min(product(numbers, temperatures), key=lambda pair: loss(*pair))


def _nearest_others(head: NearestNeighbourHead, k: int) -> tuple[Tensor, Tensor]:
    """Similarities (rows x k), float64, to each row's k nearest others, and which they are."""
    blocks = []
    for start in range(0, len(head.rows), _ROWS_AT_ONCE):
        similarity = _similarity(head.rows[start : start + _ROWS_AT_ONCE], head.rows, head.metric)
        similarity.diagonal(start).fill_(-torch.inf)
        blocks.append(similarity.topk(k, dim=1))
    return torch.cat([top.values for top in blocks]).double(), torch.cat([top.indices for top in blocks])


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
