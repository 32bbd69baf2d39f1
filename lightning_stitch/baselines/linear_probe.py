"""A linear probe: logistic regression on features, trained until it no longer changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# The loss is a mean over images, of the order of 1; with these scikit-learn's coefficients come out to six digits.
_GRADIENT, _CHANGE = 1e-8, 1e-14
_MOST_ITERATIONS = 2000


def fit_logistic(features: Tensor, labels: Tensor, *, num_classes: int, penalty: float = 1.0) -> nn.Linear:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS.

    Least sum of cross-entropies + penalty / 2 * squared norm of the weights, on features of mean 0 and standard
    deviation 1; the intercept is not penalised. So it is scikit-learn's `LogisticRegression(C=1 / penalty)` behind a
    `StandardScaler`; of two classes with C = 2 / penalty, where scikit-learn has one vector of weights. Scales and
    means are folded into weight and bias. Deterministic, in float64.

    Args:
        features: Rows x features, of any real dtype.
        labels: Integers from 0, one for each row.
        num_classes: Width of the output.
        penalty: Strength of the penalty.

    Returns:
        A layer from features as they are to logits, float32, on the device of the features.
    """
    rows = features.double()
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    deviation = deviation.where(deviation > 0, 1.0)  # a constant feature tells nothing, and gets no weight
    rows = (rows - mean) / deviation
    weight = rows.new_zeros(num_classes, rows.shape[1], requires_grad=True)
    bias = rows.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=_GRADIENT,
        tolerance_change=_CHANGE,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(rows @ weight.T + bias, labels)
        value = value + penalty / (2 * len(rows)) * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    layer = nn.Linear(rows.shape[1], num_classes, device=features.device)
    with torch.no_grad():
        layer.weight.copy_(weight / deviation)
        layer.bias.copy_(bias - (weight / deviation) @ mean)
    return layer
