from __future__ import annotations

import pytest
import torch
from doubles.tensors import normal, seeded
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightning_stitch.baselines.linear_probe import fit_logistic


def task(num_classes: int, *, rows: int = 90, width: int = 12) -> tuple[Tensor, Tensor]:
    """Features of unequal scales and means that tell something of the class."""
    labels = torch.randint(num_classes, (rows,), generator=seeded(0))
    features = normal(rows, width) + normal(num_classes, width, seed=1)[labels]
    return features * torch.logspace(-2, 2, width).double() + 5, labels


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0])
def test_it_is_scikit_learns_logistic_regression(num_classes: int, penalty: float) -> None:
    features, labels = task(num_classes)
    scaler = StandardScaler().fit(features)
    # With two classes scikit-learn has one vector, the difference of ours; so the penalty on it is half as strong.
    strength = penalty / 2 if num_classes == 2 else penalty
    expected = LogisticRegression(C=1 / strength, tol=1e-12, solver="newton-cholesky")
    expected.fit(scaler.transform(features), labels)
    layer = fit_logistic(features, labels, num_classes=num_classes, penalty=penalty).double()
    found = layer(features).softmax(1).detach()
    probabilities = torch.tensor(expected.predict_proba(scaler.transform(features)))
    assert torch.allclose(found, probabilities, atol=2e-5)


def test_more_features_than_rows_and_constant_ones_are_no_obstacle() -> None:
    features, labels = task(3, rows=20, width=200)
    features[:, 7] = 4.0
    layer = fit_logistic(features.float(), labels, num_classes=3, penalty=1e-3)
    assert layer.weight.isfinite().all()
    assert layer.weight[:, 7].abs().max() == 0
    assert (layer(features.float()).argmax(1) == labels).all()


def test_it_repeats_and_leaves_the_features_alone() -> None:
    features, labels = task(3)
    before = features.clone()
    first, second = (fit_logistic(features, labels, num_classes=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(features, before)
