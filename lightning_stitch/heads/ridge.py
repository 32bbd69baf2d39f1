"""The closed-form linear head: ridge regression on targets, chosen and calibrated by leave-one-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.score_calibration import Calibration, calibrate
from lightning_stitch.heads.targets import Task, standardised, target_columns
from lightning_stitch.maths import AffineMap, block_shares, loo_ridge, r2, ridge_weights

DEFAULT_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 9))
"""Ridge strengths tried by default: 1e-5 to 1e4 of the mean eigenvalue of the features, two in each decade."""


class RidgeHead(nn.Module):
    """A linear map, zero until `fit_ridge_head` or an optimizer gives it values.

    Attributes:
        weight: Parameter (num_classes x in_features), float32.
        bias: Parameter (num_classes,), float32.

    Args:
        in_features: Features that come in.
        num_classes: Logits, of classes or labels, or numbers that go out.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits or numbers (n x num_classes) of features (n x in_features).

        The softmax of classes' logits and the sigmoid of labels' are probabilities.
        """
        return F.linear(features, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.weight.shape[1]}, num_classes={self.weight.shape[0]}"


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """How a ridge head does on rows left out of its fit, one at a time.

    Strength and calibration were chosen on the same rows, so all figures are a little optimistic.

    Attributes:
        strength: The ridge strength of least leave-one-out squared error (`loo_ridge` has its scale).
        temperature: The factor on the regression's scores that makes logits of them; None but for classes.
        loo_accuracy: Share of rows, between 0 and 1, whose class has the highest score when they are left out; None but
            for classes.
        loo_r2: Share of the targets' variance that the predictions explain when left out; below 0: worse than means.
            Classes are one-hot; of several numbers it is the mean over them.
        loo_log_loss: Mean of -log(probability of a row's class, or of each of its labels' values) in nats, when it is
            left out; None for numbers.
        num_rows: Rows of the fit.
        block_shares: How much each block of features contributes to the predictions (`maths.block_shares`): its share
            of their variance over the rows, before calibration, numbers standardised. They sum to 1; without blocks all
            features are one.
        left_out: What the head would give of each row if that had been left out of its fit (rows x num_classes);
            None: not known.
    """

    strength: float
    temperature: float | None
    loo_accuracy: float | None
    loo_r2: float
    loo_log_loss: float | None
    num_rows: int
    block_shares: tuple[float, ...]
    left_out: Tensor | None = field(default=None, repr=False, compare=False)


@torch.no_grad()
def fit_ridge_head(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] | None = None,
    task: Task = "multiclass",
    blocks: Sequence[int] | None = None,
) -> tuple[RidgeHead, RidgeFit]:
    """Fit a linear head in closed form: ridge regression on the targets, then a calibration of its scores.

    Of the strengths, the one of least leave-one-out squared error (summed over classes or labels, or over standardised
    numbers) is taken. Classes, one-hot, then get one temperature (`class_temperature`), labels a slope and
    an offset each (`label_calibration`), both on the leave-one-out scores; numbers are predicted in their
    own units. All is folded into weight and bias. Deterministic; runs in float64 on the features' device. The head's
    parameters can be trained on. For n rows of d features it takes, beyond features and targets, a few matrices of
    min(n, d)^2, of n x num_classes, and one portion of rows or columns, all float64.

    Args:
        features: Rows x features, any real dtype.
        targets: By the task: class indices (rows,), of an integer dtype, from 0 to num_classes - 1, of which at least
            two occur; 0 and 1 (rows x labels); or numbers (rows,) or (rows x numbers).
        num_classes: Classes, labels or numbers, which is what the head gives; a class that does not occur scores 0.
        strengths: Ridge strengths to choose from; by default `DEFAULT_STRENGTHS`.
        task: "multiclass", "multilabel" or "regression".
        blocks: Widths of consecutive blocks of features, as the parts of a readout, that are to count alike: each
            feature is standardised on these rows (left out if it varies by no more than rounding) and each block
            divided by the root of its width. The head still reads raw features. None: features count as they are.

    Returns:
        The head, on the features' device in training mode, and what leave-one-out says of it.

    Raises:
        CalibrationError: If there are no rows, features have NaN or infinite values, features and targets differ in
            rows, a target is out of range, or only one class occurs, all labels agree, or a number does not vary.
        StitchError: If strengths are empty or not positive, or blocks are not widths that sum to the features' number.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
        >>> head, fit = fit_ridge_head(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)
        >>> head(features).argmax(1).tolist(), fit.loo_accuracy
        ([0, 0, 0, 1, 1, 1], 1.0)
    """
    columns = target_columns(targets, task=task, num_classes=num_classes).to(features.device)
    if len(features) != len(columns):
        raise CalibrationError(f"Each row needs one target; found {len(features)} rows and {len(columns)} targets.")
    regressed = standardised(columns)[0] if task == "regression" else columns
    loo = loo_ridge(features, regressed, strengths=DEFAULT_STRENGTHS if strengths is None else strengths, blocks=blocks)
    strength = loo.best_strength
    scores = loo.predict_left_out([strength])[0]
    calibration = calibrate(scores, regressed, task=task)
    if task == "regression":
        _, mean, deviation = standardised(columns)
        calibration = replace(calibration, factor=deviation, offset=mean)
    head = linear_head(ridge_weights(loo, strength=strength), calibration)
    shares = (1.0,) if blocks is None else block_shares(loo, strength=strength, blocks=blocks)
    c = calibration
    left_out = c.factor * scores + c.offset
    figures = (strength, c.temperature, c.accuracy, r2(scores, regressed), c.log_loss, len(columns), shares)
    return head, RidgeFit(*figures, left_out)


def linear_head(solution: AffineMap, calibration: Calibration) -> RidgeHead:
    """The head of a regression, the calibration of its scores folded in."""
    assert solution.bias is not None
    factor, offset = calibration.factor, calibration.offset
    # A search may run in inference mode, whose tensors can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        head = RidgeHead(solution.weight.shape[1], len(solution.weight)).to(solution.weight.device)
        head.weight.copy_(solution.weight * factor[:, None])
        head.bias.copy_(solution.bias * factor + offset)
    return head
