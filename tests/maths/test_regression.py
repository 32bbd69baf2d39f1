from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.tensors import normal, related
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths.leave_one_out import loo_ridge, ridge_weights
from lightning_stitch.maths.regression import r2, ridge_least_squares

GOOD = normal(8, 3)
NAN = GOOD.clone()
NAN[2, 1], NAN[5, 0] = float("nan"), float("inf")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "channels"), [(40, 6), (10, 25), (12, 12)])
def test_ridge_is_scikit_learns(n: int, channels: int, bias: bool) -> None:
    x, y = related(n, channels, 4)
    x, y = x + 3, y - 2
    fit = ridge_least_squares(x, y, ridge=0.1, bias=bias)
    centred = x - x.mean(0) if bias else x
    assert fit.ridge == pytest.approx(0.1 * float(centred.square().sum()) / channels)
    reference = Ridge(alpha=fit.ridge, fit_intercept=bias).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(fit.weight.numpy(), reference.coef_, atol=1e-10)
    if fit.bias is None:
        assert not bias
    else:
        np.testing.assert_allclose(fit.bias.numpy(), reference.intercept_, atol=1e-9)
    assert fit.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0, 1e-3])
@pytest.mark.parametrize(("n", "channels"), [(40, 6), (10, 25)])
def test_without_a_diagnosis_it_is_the_same_map(n: int, channels: int, ridge: float, bias: bool) -> None:
    x, y = related(n, channels, 4)
    x, y = x + 3, y - 2
    full, fast = (ridge_least_squares(x, y, ridge=ridge, bias=bias, diagnose=diagnose) for diagnose in (True, False))
    torch.testing.assert_close(fast.weight, full.weight)
    torch.testing.assert_close(fast(x), full(x))
    assert fast.ridge == pytest.approx(full.ridge)
    assert (fast.rank is None) == (fast.condition is None) == (ridge > 0 and n >= channels)
    assert full(x).shape == y.shape


def test_what_does_not_vary_predicts_the_mean_diagnosed_or_not() -> None:
    x, y = torch.full((9, 3), 5.0), normal(9, 2)
    for diagnose in (True, False):
        fit = ridge_least_squares(x, y, ridge=0.1, diagnose=diagnose)
        torch.testing.assert_close(fit(x.double()), y.mean(0).expand(9, 2))


@pytest.mark.parametrize(("n", "channels", "rank"), [(40, 6, 6), (10, 25, 10), (40, 12, 5), (10, 25, 4)])
def test_without_ridge_and_bias_it_is_the_papers_pseudo_inverse(n: int, channels: int, rank: int) -> None:
    x = normal(n, rank) @ normal(rank, channels, seed=1) if rank < min(n, channels) else normal(n, channels)
    y = normal(n, 3, seed=2)
    fit = ridge_least_squares(x, y, ridge=0, bias=False)
    torch.testing.assert_close(fit.weight, y.T @ torch.linalg.pinv(x.T, rtol=1e-6), atol=1e-9, rtol=0)
    singular = torch.linalg.svdvals(x)[:rank]
    assert fit.bias is None
    assert fit.ridge == 0
    assert fit.rank == rank
    assert fit.condition == pytest.approx(float((singular[0] / singular[-1]) ** 2), rel=1e-6)


@pytest.mark.parametrize(("n", "channels"), [(40, 6), (6, 6)])
def test_ridge_finds_a_planted_affine_map(n: int, channels: int) -> None:
    x, weight, bias = normal(n, channels) + 100, normal(4, channels, seed=1), normal(4, seed=2)
    y = x @ weight.T + bias
    fit = ridge_least_squares(x.float(), y, ridge=1e-12)
    assert fit.bias is not None
    prediction = x @ fit.weight.T + fit.bias
    assert r2(prediction, y) > 1 - 1e-9
    if n > channels:
        torch.testing.assert_close(fit.weight, weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(fit.bias, bias, atol=1e-2, rtol=0)


def test_ridge_strength_is_free_of_scale_and_bounds_the_condition() -> None:
    x, y = related(30, 8, 3)
    small, large = ridge_least_squares(x, y, ridge=0.3), ridge_least_squares(1e4 * x, y, ridge=0.3)
    torch.testing.assert_close(small.weight, 1e4 * large.weight)
    eigenvalues = torch.linalg.svdvals(x - x.mean(0)).square()
    penalty = 0.3 * eigenvalues.mean()
    assert small.condition == pytest.approx(float((eigenvalues[0] + penalty) / (eigenvalues[-1] + penalty)))
    assert small.condition == pytest.approx(large.condition)


@pytest.mark.parametrize("ridge", [0, 1e-3])
def test_a_constant_sender_predicts_the_receivers_mean(ridge: float) -> None:
    y = normal(8, 2)
    fit = ridge_least_squares(torch.ones(8, 3), y, ridge=ridge)
    assert fit.bias is not None
    assert (fit.rank, fit.condition, fit.ridge) == (0, 1, 0)
    assert not fit.weight.any()
    torch.testing.assert_close(fit.bias, y.mean(0))


@pytest.mark.parametrize("ridge", [-1e-3, float("nan"), float("inf")])
def test_ridge_must_be_a_strength(ridge: float) -> None:
    with pytest.raises(StitchError, match="ridge must be a finite number of at least 0; found"):
        ridge_least_squares(GOOD, GOOD, ridge=ridge)


def test_ridge_says_what_it_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="y has NaN or infinite values in 2 of its 8 rows"):
        ridge_least_squares(GOOD, NAN)
    with pytest.raises(CalibrationError, match="x and y must have the same number of rows"):
        ridge_least_squares(GOOD, GOOD[1:])


def test_r2_is_scikit_learns() -> None:
    prediction, target = related(20, 5, 5)
    target = target + 10
    expected = r2_score(target.numpy(), prediction.numpy(), multioutput="variance_weighted")
    assert r2(prediction, target) == pytest.approx(expected)
    assert r2(target, target) == 1
    assert r2(target.mean(0).expand_as(target), target) == pytest.approx(0, abs=1e-12)


def test_r2_says_what_it_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="the target is constant"):
        r2(GOOD, torch.ones(8, 3))
    with pytest.raises(CalibrationError, match="The target has 2 columns, the prediction 3"):
        r2(GOOD, GOOD[:, :2])
    with pytest.raises(CalibrationError, match="the prediction and the target must have the same number of rows"):
        r2(GOOD, GOOD[1:])
    with pytest.raises(CalibrationError, match="the prediction has NaN"):
        r2(NAN, GOOD)


STRENGTHS = (1e-6, 1e-3, 0.1, 1.0, 100.0)


@pytest.mark.parametrize(("n", "d", "rank"), [(15, 4, 4), (9, 20, 20), (8, 8, 8), (14, 10, 3), (2, 5, 5)])
def test_leave_one_out_is_ridge_refitted_without_each_row(n: int, d: int, rank: int) -> None:
    features = (normal(n, rank) @ normal(rank, d, seed=1) + 4).numpy()
    targets = normal(n, 2, seed=2).numpy()
    fit = loo_ridge(torch.from_numpy(features), torch.from_numpy(targets), strengths=STRENGTHS)
    assert fit.predictions.shape == (len(STRENGTHS), n, 2)
    centred = features - features.mean(0)
    assert fit.scale == pytest.approx(np.square(centred).sum() / min(n - 1, d))
    for strength, predictions in zip(STRENGTHS, fit.predictions.numpy(), strict=True):
        for row in range(n):
            others = np.arange(n) != row
            model = Ridge(alpha=strength * fit.scale, solver="svd").fit(features[others], targets[others])
            np.testing.assert_allclose(predictions[row], model.predict(features[row : row + 1])[0], atol=1e-7)


@pytest.mark.parametrize(("n", "d"), [(30, 6), (12, 40)])
def test_leave_one_out_errors_are_those_of_ridge_cv(n: int, d: int) -> None:
    features, targets = related(n, d, 2)
    fit = loo_ridge(features, targets, strengths=STRENGTHS)
    penalties = [strength * fit.scale for strength in STRENGTHS]
    reference = RidgeCV(penalties, store_cv_results=True).fit(features.numpy(), targets.numpy())
    errors = (fit.predictions - targets).square()
    np.testing.assert_allclose(errors.permute(1, 2, 0).numpy(), reference.cv_results_, rtol=1e-6, atol=1e-9)
    assert penalties[int(errors.sum((1, 2)).argmin())] == pytest.approx(reference.alpha_)


@pytest.mark.parametrize(("n", "d"), [(30, 6), (12, 40)])
def test_ridge_weights_are_those_of_all_rows(n: int, d: int) -> None:
    features, targets = related(n, d, 2)
    fit = loo_ridge(features + 5, targets, strengths=[1.0])
    for strength in (1.0, 0.01):
        solution = ridge_weights(fit, strength=strength)
        reference = Ridge(alpha=strength * fit.scale).fit(features.numpy() + 5, targets.numpy())
        assert solution.bias is not None
        np.testing.assert_allclose(solution.weight.numpy(), reference.coef_, atol=1e-10)
        np.testing.assert_allclose(solution.bias.numpy(), reference.intercept_, atol=1e-9)


def test_a_row_that_alone_has_a_feature_is_predicted_from_the_others() -> None:
    features = torch.cat([torch.zeros(9, 1), torch.ones(1, 1)])
    targets = torch.cat([torch.zeros(9, 1), torch.full((1, 1), 50.0)])
    fit = loo_ridge(features, targets, strengths=[1e-9])
    assert float(fit.predictions[0, 9]) == pytest.approx(0, abs=1e-4)


def test_constant_features_leave_the_mean_of_the_others() -> None:
    targets = torch.tensor([[0.0], [3.0], [6.0]])
    fit = loo_ridge(torch.ones(3, 2), targets, strengths=[1e-3, 1.0])
    torch.testing.assert_close(fit.predictions[1, :, 0], torch.tensor([4.5, 3.0, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("strengths", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_strengths_must_be_positive(strengths: list[float]) -> None:
    with pytest.raises(StitchError, match="Ridge strengths must be one or more positive finite numbers; found"):
        loo_ridge(GOOD, GOOD, strengths=strengths)
    fit = loo_ridge(GOOD, GOOD, strengths=[1.0])
    with pytest.raises(StitchError, match="positive finite"):
        ridge_weights(fit, strength=strengths[-1] if strengths else 0.0)


def test_leave_one_out_says_what_it_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="at least 2 rows; found 1"):
        loo_ridge(GOOD[:1], GOOD[:1], strengths=[1.0])
    with pytest.raises(CalibrationError, match="features has NaN or infinite values in 2 of its 8 rows"):
        loo_ridge(NAN, GOOD, strengths=[1.0])
    with pytest.raises(CalibrationError, match="features and targets must have the same number of rows"):
        loo_ridge(GOOD, GOOD[1:], strengths=[1.0])
