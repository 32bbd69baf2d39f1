from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.tensors import normal
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.ridge import fit_ridge_head

FEATURES = normal(50, 8)
TRUTH = FEATURES @ normal(8, 3, seed=1) + 2 * normal(50, 3, seed=2)
LABELS = (torch.tensor([0.0, 2.0, -1.0]) < TRUTH).long()
NUMBERS = TRUTH[:, :2] * torch.tensor([1.0, 1000.0]) + torch.tensor([5.0, -70.0])


def refitted(features: Tensor, columns: Tensor, strength: float) -> np.ndarray:
    """Predictions of every row by scikit-learn, fitted on all rows but that one."""
    x, y = features.double().numpy(), columns.double().numpy()
    penalty = strength * ((x - x.mean(0)) ** 2).sum() / min(len(x) - 1, x.shape[1])
    rows = []
    for row in range(len(x)):
        others = np.arange(len(x)) != row
        rows.append(Ridge(alpha=penalty).fit(x[others], y[others]).predict(x[row : row + 1])[0])
    return np.stack(rows)


def test_numbers_are_predicted_in_their_own_units_as_ridge_regression_does() -> None:
    head, fit = fit_ridge_head(FEATURES, NUMBERS, num_classes=2, task="regression")
    x, y = FEATURES.numpy(), NUMBERS.numpy()
    penalty = fit.strength * ((x - x.mean(0)) ** 2).sum() / 8
    expected = Ridge(alpha=penalty).fit(x, y).predict(x)
    np.testing.assert_allclose(head(FEATURES.float()).detach().numpy(), expected, rtol=1e-3, atol=1e-2)


def test_leave_one_out_r2_of_numbers_is_the_mean_over_them_whatever_their_units() -> None:
    _, fit = fit_ridge_head(FEATURES, NUMBERS, num_classes=2, task="regression")
    predictions = refitted(FEATURES, NUMBERS, fit.strength)
    assert fit.loo_r2 == pytest.approx(r2_score(NUMBERS.numpy(), predictions, multioutput="uniform_average"))
    assert fit == fit_ridge_head(FEATURES, NUMBERS * torch.tensor([1e-4, 1.0]), num_classes=2, task="regression")[1]
    assert (fit.loo_accuracy, fit.loo_log_loss, fit.temperature) == (None, None, None)


def test_single_numbers_may_have_a_dimension_or_none() -> None:
    one, other = NUMBERS[:, 0], NUMBERS[:, :1]
    heads = [fit_ridge_head(FEATURES, y, num_classes=1, task="regression")[0] for y in (one, other)]
    torch.testing.assert_close(heads[0].state_dict(), heads[1].state_dict(), rtol=0, atol=0)
    assert heads[0](FEATURES.float()).shape == (50, 1)


def test_leave_one_out_log_loss_and_r2_of_labels_are_those_of_refits_without_each_row() -> None:
    head, fit = fit_ridge_head(FEATURES, LABELS, num_classes=3, task="multilabel")
    scores = refitted(FEATURES, LABELS, fit.strength)
    assert fit.loo_r2 == pytest.approx(r2_score(LABELS.numpy(), scores, multioutput="variance_weighted"))
    # A head is linear: what it makes of the regression's own scores is its calibration.
    penalty = fit.strength * float((FEATURES - FEATURES.mean(0)).square().sum()) / 8
    regression = Ridge(alpha=penalty).fit(FEATURES.numpy(), LABELS.double().numpy())
    own = torch.from_numpy(regression.predict(FEATURES.numpy()))
    logits = head(FEATURES.float()).detach().double()
    slopes = (logits[1] - logits[0]) / (own[1] - own[0])
    offsets = logits[0] - slopes * own[0]
    left_out = slopes * torch.from_numpy(scores) + offsets
    assert fit.loo_log_loss == pytest.approx(
        float(F.binary_cross_entropy_with_logits(left_out, LABELS.double())), abs=1e-4
    )
    assert fit.loo_log_loss < 0.6  # 0.69 for a coin


def test_probabilities_of_labels_that_cannot_be_learnt_are_their_shares() -> None:
    noise = normal(300, 20, seed=7)
    labels = (torch.rand(300, 2, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.2, 0.7])).long()
    head, _ = fit_ridge_head(noise, labels, num_classes=2, task="multilabel")
    probabilities = head(noise.float()).detach().sigmoid()
    shares = labels.float().mean(0).expand(300, 2)
    torch.testing.assert_close(probabilities, shares, atol=0.1, rtol=0)


def test_a_label_that_no_row_has_is_improbable_and_does_no_harm() -> None:
    labels = torch.cat([LABELS, torch.zeros(50, 1, dtype=torch.int64)], 1)
    head, _ = fit_ridge_head(FEATURES, labels, num_classes=4, task="multilabel")
    probabilities = head(FEATURES.float()).detach().sigmoid()
    assert float(probabilities[:, 3].max()) < 0.05
    assert float(((probabilities[:, :3] > 0.5) == LABELS.bool()).double().mean()) > 0.75


def test_rows_without_targets_of_their_own_are_refused() -> None:
    with pytest.raises(CalibrationError, match="found 50 rows and 49 targets"):
        fit_ridge_head(FEATURES, LABELS[1:], num_classes=3, task="multilabel")
