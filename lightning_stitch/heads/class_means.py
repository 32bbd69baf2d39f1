"""The nearest-class-mean head: each class is the mean of its images' features, as in prototypical networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads.neighbours import Metric
from lightning_stitch.heads.score_calibration import class_temperature
from lightning_stitch.heads.targets import target_columns


class ClassMeanHead(nn.Module):
    """Scores classes by how near their means are, zero until `fit_class_mean_head` or a state dict gives it values.

    Features and means are relative to `centre`. The score of a class is -|x - m|^2 (prototypical networks, Snell et al.
    2017; less |x|^2, which all classes share), or the cosine of x and m; its logit is `temperature` times that.

    Attributes:
        means: Parameter (num_classes x in_features), float32.
        centre: Buffer (in_features,): the labelled images' mean.
        temperature: Buffer ().

    Args:
        in_features: Features that come in.
        num_classes: Logits that go out.
        metric: "euclidean" or "cosine".

    Raises:
        StitchError: If the metric is unknown.
    """

    centre: Tensor
    temperature: Tensor

    def __init__(self, in_features: int, num_classes: int, *, metric: Metric = "euclidean") -> None:
        super().__init__()
        if metric not in get_args(Metric):
            raise StitchError(f"metric must be one of {get_args(Metric)}; found {metric!r}.")
        self.metric: Metric = metric
        self.means = nn.Parameter(torch.zeros(num_classes, in_features))
        self.register_buffer("centre", torch.zeros(in_features))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n x num_classes) of features (n x in_features); their softmax is a class probability."""
        x = features - self.centre
        if self.metric == "cosine":
            return self.temperature * (F.normalize(x, dim=1) @ F.normalize(self.means, dim=1).T)
        return self.temperature * (2 * x @ self.means.T - self.means.square().sum(1))

    def extra_repr(self) -> str:
        """Sizes and metric, for printing."""
        return f"in_features={self.means.shape[1]}, num_classes={self.means.shape[0]}, metric={self.metric!r}"


@dataclass(frozen=True, slots=True)
class ClassMeanFit:
    """How a nearest-class-mean head does on rows left out of their class's mean, one at a time.

    Attributes:
        temperature: The factor on the scores, chosen on the same rows.
        loo_accuracy: Share of rows whose own class is nearest; one that is alone in its class is wrong.
        loo_log_loss: Mean of -log(probability of a row's class) in nats over rows that are not alone in it; None: all
            are.
        num_rows: Rows of the fit.
    """

    temperature: float
    loo_accuracy: float
    loo_log_loss: float | None
    num_rows: int


@torch.no_grad()
def fit_class_mean_head(
    features: Tensor, targets: Tensor, *, num_classes: int, metric: Metric = "euclidean"
) -> tuple[ClassMeanHead, ClassMeanFit]:
    """Take each class's mean as its prototype; one temperature is chosen by leave-one-out log-loss.

    Plain: one mean for each class, no covariance. Deterministic; runs in float64 on the features' device. The means can
    be trained on.

    Args:
        features: Rows x features, any real dtype.
        targets: Class indices (rows,), of an integer dtype, from 0 to num_classes - 1; every class occurs.
        num_classes: Number of classes.
        metric: "euclidean" or "cosine", the latter about the rows' mean.

    Returns:
        The head, and what leave-one-out says of it.

    Raises:
        CalibrationError: If features or targets cannot be used (as `fit_ridge_head`), or a class has no row.
        StitchError: If the metric is unknown.

    Example:
        >>> features = torch.tensor([[0.0], [0.2], [0.9], [1.1]])
        >>> head, fit = fit_class_mean_head(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> head(torch.tensor([[0.4], [0.7]])).argmax(1).tolist(), fit.loo_accuracy
        ([0, 1], 1.0)
    """
    one_hot = target_columns(targets, task="multiclass", num_classes=num_classes).to(features.device)
    if features.ndim != 2 or len(features) != len(one_hot):
        raise CalibrationError(
            f"Each row needs one target; found features of shape {tuple(features.shape)} and {len(one_hot)} targets."
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise CalibrationError(f"features has NaN or infinite values in {bad} of its {len(features)} rows.")
    sizes = one_hot.sum(0)
    missing = (sizes == 0).nonzero().flatten().tolist()
    if missing:
        raise CalibrationError(
            f"The classes {missing[:10]} have no row, so they have no mean; give images of each, or use a ridge head."
        )
    centre = features.double().mean(0)
    x = features.double() - centre
    means = one_hot.T @ x / sizes[:, None]
    scores = _left_out_scores(x, means, one_hot, sizes, metric)
    known = one_hot.mv(sizes) > 1
    temperature, log_loss = 1.0, None
    if known.any():
        # Scores are brought to about one unit, which is what the choice of temperature expects.
        unit = float((scores[known] - scores[known].amax(1, keepdim=True)).abs().mean().clamp_min(1e-12))
        temperature = class_temperature(scores[known] / unit, one_hot[known]) / unit
        log_loss = F.cross_entropy(temperature * scores[known], one_hot[known].argmax(1)).item()
    with torch.inference_mode(False), torch.no_grad():
        head = ClassMeanHead(features.shape[1], num_classes, metric=metric).to(features.device)
        head.means.copy_(means)
        head.centre.copy_(centre)
        head.temperature.fill_(temperature)
    right = (scores.argmax(1) == one_hot.argmax(1)) & known
    return head, ClassMeanFit(temperature, right.double().mean().item(), log_loss, len(x))


def _left_out_scores(x: Tensor, means: Tensor, one_hot: Tensor, sizes: Tensor, metric: Metric) -> Tensor:
    """Each row's scores, its own class's mean without it; what is alone in its class has that of the mean with it."""
    own = one_hot.argmax(1)
    size = sizes[own][:, None]
    without = (size * means[own] - x) / (size - 1).clamp_min(1)
    without = torch.where(size > 1, without, means[own])
    if metric == "cosine":
        unit = F.normalize(x, dim=1)
        scores = unit @ F.normalize(means, dim=1).T
        left_out = (unit * F.normalize(without, dim=1)).sum(1)
    else:
        scores = 2 * x @ means.T - means.square().sum(1)
        left_out = 2 * (x * without).sum(1) - without.square().sum(1)
    scores[torch.arange(len(x), device=x.device), own] = left_out
    return scores
