"""Closed-form heads: a linear classifier fitted by ridge regression, chosen and calibrated by leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError
from lightning_stitch.regression import LooRidge, loo_ridge, r2, ridge_weights

DEFAULT_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 9))
"""Ridge strengths tried by default: 1e-5 to 1e4 of the mean eigenvalue of the features, two in each decade."""

_TEMPERATURES = (1e-3, 1e3)  # scores lie around [0, 1]: nearly uniform probabilities up to nearly certain ones
_BISECTIONS = 40


class RidgeHead(nn.Module):
    """A linear classifier, zero until `fit_ridge_head` or an optimizer gives it values.

    Attributes:
        weight: Parameter (num_classes x in_features), float32.
        bias: Parameter (num_classes,), float32.

    Args:
        in_features: Features that come in.
        num_classes: Logits that go out.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n x num_classes) of features (n x in_features); their softmax is a class probability."""
        return F.linear(features, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.weight.shape[1]}, num_classes={self.weight.shape[0]}"


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """How a ridge head does on rows left out of its fit, one at a time.

    Strength and temperature were chosen on the same rows, so all three figures are a little optimistic.

    Attributes:
        strength: The ridge strength of least leave-one-out squared error (`loo_ridge` has its scale).
        temperature: The factor on the regression's scores that makes logits of them.
        loo_accuracy: Share of rows, between 0 and 1, whose class has the highest score when they are left out.
        loo_r2: Share of the one-hot targets' variance that the scores explain when left out; below 0: worse than means.
        loo_log_loss: Mean of -log(probability of a row's class) in nats, when it is left out.
        num_rows: Rows of the fit.
    """

    strength: float
    temperature: float
    loo_accuracy: float
    loo_r2: float
    loo_log_loss: float
    num_rows: int


@torch.no_grad()
def fit_ridge_head(
    features: Tensor, targets: Tensor, *, num_classes: int, strengths: Sequence[float] | None = None
) -> tuple[RidgeHead, RidgeFit]:
    """Fit a linear classifier in closed form: ridge regression on one-hot targets, then one temperature.

    Of the strengths, the one of least leave-one-out squared error (summed over classes) is taken. The temperature
    minimises the leave-one-out log-loss, as though one further row were labelled at random: without that, classes that
    are told apart without error would get infinite logits (compare Platt 1999, section 2.2). Both are folded into
    weight and bias. Deterministic; runs in float64 on the features' device. The head's parameters can be trained on.

    Args:
        features: Rows x features, any real dtype.
        targets: Class indices (rows,), of an integer dtype, from 0 to num_classes - 1; at least two classes occur.
        num_classes: Logits of the head; a class that does not occur scores 0.
        strengths: Ridge strengths to choose from; by default `DEFAULT_STRENGTHS`.

    Returns:
        The head, on the features' device in training mode, and what leave-one-out says of it.

    Raises:
        CalibrationError: If there are no rows, features have NaN or infinite values, features and targets differ in
            rows, a target is out of range, or only one class occurs.
        StitchError: If strengths are empty or not positive.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
        >>> head, fit = fit_ridge_head(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)
        >>> head(features).argmax(1).tolist(), fit.loo_accuracy
        ([0, 0, 0, 1, 1, 1], 1.0)
    """
    loo, fit = _chosen(features, targets, num_classes, strengths)
    solution = ridge_weights(loo, strength=fit.strength)
    # A search may run in inference mode, whose tensors can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        head = RidgeHead(features.shape[1], num_classes).to(features.device)
        head.weight.copy_(solution.weight * fit.temperature)
        if solution.bias is not None:
            head.bias.copy_(solution.bias * fit.temperature)
    return head, fit


@torch.no_grad()
def loo_scores(
    features: Tensor, targets: Tensor, *, num_classes: int, strengths: Sequence[float] | None = None
) -> RidgeFit:
    """What leave-one-out says of the head that `fit_ridge_head` would fit, for ranking many candidates.

    Costs one eigendecomposition of min(rows, features) squared.

    Args:
        features: As for `fit_ridge_head`.
        targets: As for `fit_ridge_head`.
        num_classes: As for `fit_ridge_head`.
        strengths: As for `fit_ridge_head`.

    Raises:
        CalibrationError: As `fit_ridge_head`.
        StitchError: As `fit_ridge_head`.
    """
    return _chosen(features, targets, num_classes, strengths)[1]


def _chosen(
    features: Tensor, targets: Tensor, num_classes: int, strengths: Sequence[float] | None
) -> tuple[LooRidge, RidgeFit]:
    targets = _class_indices(features, targets, num_classes)
    one_hot = F.one_hot(targets, num_classes).double()
    loo = loo_ridge(features, one_hot, strengths=DEFAULT_STRENGTHS if strengths is None else strengths)
    best = int((loo.predictions - one_hot).square().sum((1, 2)).argmin())
    scores = loo.predictions[best]
    temperature = _temperature(scores, one_hot)
    return loo, RidgeFit(
        strength=loo.strengths[best],
        temperature=temperature,
        loo_accuracy=(scores.argmax(1) == targets).double().mean().item(),
        loo_r2=r2(scores, one_hot),
        loo_log_loss=F.cross_entropy(temperature * scores, targets).item(),
        num_rows=len(targets),
    )


def _class_indices(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    if targets.ndim != 1 or targets.is_floating_point():
        raise CalibrationError(
            f"Targets must be class indices, one integer for each row; found {targets.dtype} of shape "
            f"{tuple(targets.shape)}."
        )
    if not len(targets):
        raise CalibrationError("A head needs labelled rows to be fitted; found none.")
    if len(features) != len(targets):
        raise CalibrationError(f"Each row needs one target; found {len(features)} rows and {len(targets)} targets.")
    classes = targets.unique().tolist()
    if classes[0] < 0 or classes[-1] >= num_classes:
        raise CalibrationError(
            f"Targets must lie from 0 to {num_classes - 1} (num_classes={num_classes}); found {classes[0]} to "
            f"{classes[-1]}."
        )
    if len(classes) == 1:
        raise CalibrationError(
            f"A head needs rows of at least two classes; all {len(targets)} targets are {classes[0]}. "
            f"Shuffle before taking a part of the images, or take more of them."
        )
    return targets.to(features.device, torch.int64)


def _temperature(scores: Tensor, one_hot: Tensor) -> float:
    """The factor of least smoothed log-loss; that is convex, so its slope is bisected, in the factor's logarithm."""
    n, num_classes = scores.shape
    smoothed = (n * one_hot + 1 / num_classes) / (n + 1)
    target_score = (smoothed * scores).sum() / n
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mean_score = ((math.exp(middle) * scores).softmax(1) * scores).sum() / n
        low, high = (middle, high) if mean_score < target_score else (low, middle)
    return math.exp((low + high) / 2)
