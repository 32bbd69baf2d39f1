from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.tensors import normal
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from lightning_stitch.heads.score_calibration import class_temperature, label_calibration


@pytest.mark.parametrize("strength", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_labels_calibration_is_platts_logistic_regression_on_smoothed_targets(strength: float, scale: float) -> None:
    signal = normal(60, 2, seed=1)
    labels = (signal + normal(60, 2, seed=2) / strength > 0.7).double()
    slopes, offsets = label_calibration(scale * signal + 5, labels)
    for x, y, slope, offset in zip(signal.T, labels.T, slopes, offsets, strict=True):
        positives = float(y.sum())
        wanted = np.where(y > 0, (positives + 1) / (positives + 2), 1 / (60 - positives + 2))
        # A soft target is a positive and a negative example that share its weight.
        reference = LogisticRegression(C=1e8, tol=1e-10, max_iter=10000)
        rows, weights = np.concatenate([x, x])[:, None], np.concatenate([wanted, 1 - wanted])
        reference.fit(rows, np.repeat([1, 0], 60), sample_weight=weights)
        expected = reference.predict_proba(x[:, None].numpy())[:, 1]
        found = (slope * (scale * x + 5) + offset).sigmoid()
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_scores_that_lie_the_wrong_way_get_the_share_of_each_label_not_a_negative_slope() -> None:
    labels = torch.tensor([0, 1] * 15 + [0] * 30)[:, None].double()
    slope, offset = label_calibration(-labels + 0.1 * normal(60, 1), labels)
    assert float(slope) == 0
    assert float(offset.sigmoid()) == pytest.approx(0.25, abs=0.02)


def test_a_label_that_all_or_none_have_is_nearly_certain_whatever_its_scores() -> None:
    labels = torch.stack([torch.ones(40), torch.zeros(40)], 1).double()
    slopes, offsets = label_calibration(labels, labels)
    assert torch.equal(slopes, torch.zeros(2).double())
    assert offsets.sigmoid().tolist() == pytest.approx([41 / 42, 1 / 42])


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_a_temperature_has_the_least_smoothed_log_loss(spread: float) -> None:
    one_hot = F.one_hot(torch.arange(30) % 3).double()
    scores = one_hot + spread * normal(30, 3)
    grid = torch.logspace(-3, 3, 2001, dtype=torch.float64)
    losses = [F.cross_entropy(factor * scores, (30 * one_hot + 1 / 3) / 31) for factor in grid]
    assert class_temperature(scores, one_hot) == pytest.approx(float(grid[torch.stack(losses).argmin()]), rel=0.01)
