from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.tensors import normal, related
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from lightning_stitch.errors import CalibrationError, StitchError
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
