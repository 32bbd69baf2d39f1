"""The closed-form linear head: ridge regression on targets, chosen and calibrated by leave-one-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.score_calibration import class_temperature, label_calibration
from lightning_stitch.heads.targets import Task, standardised, target_columns
from lightning_stitch.maths import loo_ridge, r2

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
        block_shares: Of each block of features its share of the variance of what is predicted for these rows: how far
            its part of the prediction goes with the whole. They sum to 1; one may be below 0. Empty without blocks.
    """

    strength: float
    temperature: float | None
    loo_accuracy: float | None
    loo_r2: float
    loo_log_loss: float | None
    num_rows: int
    block_shares: tuple[float, ...] = ()


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
    parameters can be trained on.

    With blocks, what several taps read side by side, each feature is standardised on these rows and each block divided
    by the root of its width, so that a wide one does not outweigh a narrow one; that is folded into weight and bias,
    too. Memory is a few matrices of min(rows, features)^2 (`lightning_stitch.maths.left_out`).

    Args:
        features: Rows x features, any real dtype.
        targets: By the task: class indices (rows,), of an integer dtype, from 0 to num_classes - 1, of which at least
            two occur; 0 and 1 (rows x labels); or numbers (rows,) or (rows x numbers).
        num_classes: Classes, labels or numbers, which is what the head gives; a class that does not occur scores 0.
        strengths: Ridge strengths to choose from; by default `DEFAULT_STRENGTHS`.
        task: "multiclass", "multilabel" or "regression".
        blocks: Widths of the blocks of features, in a row; None: features are taken as they are.

    Returns:
        The head, on the features' device in training mode, and what leave-one-out says of it.

    Raises:
        CalibrationError: If there are no rows, features have NaN or infinite values, features and targets differ in
            rows, a target is out of range, or only one class occurs, all labels agree, or a number does not vary.
        StitchError: If strengths are empty or not positive, or the blocks are not the features' width together.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
        >>> head, fit = fit_ridge_head(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)
        >>> head(features).argmax(1).tolist(), fit.loo_accuracy
        ([0, 0, 0, 1, 1, 1], 1.0)
    """
    columns = target_columns(targets, task=task, num_classes=num_classes).to(features.device)
    if len(features) != len(columns):
        raise CalibrationError(f"Each row needs one target; found {len(features)} rows and {len(columns)} targets.")
    offset, factor = torch.zeros_like(columns[0]), torch.ones_like(columns[0])
    if task == "regression":
        columns, offset, factor = standardised(columns)
    strengths = DEFAULT_STRENGTHS if strengths is None else strengths
    loo = loo_ridge(features, columns, strengths=strengths, blocks=blocks)
    strength = loo.strengths[int(loo.squared_errors.sum(1).argmin())]
    scores = loo.left_out(strength)
    temperature = accuracy = log_loss = None
    if task == "multiclass":
        temperature = class_temperature(scores, columns)
        factor = factor * temperature
        accuracy = (scores.argmax(1) == columns.argmax(1)).double().mean().item()
        log_loss = F.cross_entropy(temperature * scores, columns.argmax(1)).item()
    elif task == "multilabel":
        factor, offset = label_calibration(scores, columns)
        log_loss = F.binary_cross_entropy_with_logits(factor * scores + offset, columns).item()
    solution = loo.weights(strength)
    assert solution.bias is not None
    # A search may run in inference mode, whose tensors can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        head = RidgeHead(features.shape[1], num_classes).to(features.device)
        head.weight.copy_(solution.weight * factor[:, None])
        head.bias.copy_(solution.bias * factor + offset)
    shares = () if blocks is None else _block_shares(features, solution.weight, blocks)
    return head, RidgeFit(strength, temperature, accuracy, r2(scores, columns), log_loss, len(columns), shares)


def _block_shares(features: Tensor, weight: Tensor, blocks: Sequence[int]) -> tuple[float, ...]:
    """Each block's share of the variance of what a linear map predicts: its part's covariance with the whole."""
    parts = [
        x.double() @ w.T for x, w in zip(features.split(list(blocks), 1), weight.split(list(blocks), 1), strict=True)
    ]
    whole = sum(parts[1:], parts[0])
    whole = whole - whole.mean(0)
    total = whole.square().sum().item()
    return tuple((part * whole).sum().item() / total if total else 0.0 for part in parts)
