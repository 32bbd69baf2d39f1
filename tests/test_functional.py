from __future__ import annotations

import doctest
from functools import reduce

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from torch import Tensor

from lightning_stitch import functional
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.functional import (
    centre_rows,
    cka_from_moments,
    cka_moments,
    cka_with_many,
    linear_cka,
    loo_ridge,
    merge_cka_moments,
    r2,
    ridge_least_squares,
    ridge_weights,
    row_bank,
)

ESTIMATORS = ("debiased", "biased")
SHAPES = [(20, 3, 5), (9, 30, 40), (12, 5, 40), (40, 8, 8), (4, 2, 3)]  # rows, channels of x, of y


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, cx: int, cy: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two activations that share part of what they say."""
    common = normal(n, 3, seed=seed)
    x = common @ normal(3, cx, seed=seed + 1) + 0.5 * normal(n, cx, seed=seed + 2)
    y = common @ normal(3, cy, seed=seed + 3) + 0.5 * normal(n, cy, seed=seed + 4)
    return x, y


def gram_cka(x: Tensor, y: Tensor, estimator: str) -> float:
    """The definition, on explicit Gram matrices: Kornblith et al. 2019, and eq. 5 of Song et al. 2012."""
    n = len(x)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        if estimator == "biased":
            h = torch.eye(n, dtype=torch.float64) - 1 / n
            return (k @ h @ m @ h).trace()
        k, m = k - k.diag().diag(), m - m.diag().diag()
        return (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()

    kx, ky = x @ x.T, y @ y.T
    return float(hsic(kx, ky) / (hsic(kx, kx) * hsic(ky, ky)).sqrt())


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(functional) == (0, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cka_is_its_definition_on_gram_matrices(shape: tuple[int, int, int], estimator: str) -> None:
    x, y = related(*shape)
    cka = linear_cka(x, y, estimator=estimator)
    assert cka.dtype == torch.float64
    assert cka.shape == ()
    assert float(cka) == pytest.approx(gram_cka(x, y, estimator), abs=1e-11)
    assert float(cka) == pytest.approx(float(linear_cka(y, x, estimator=estimator)), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("channels", [6, 50])
def test_cka_is_one_for_rotations_scalings_and_shifts(channels: int, estimator: str) -> None:
    x = normal(20, channels)
    rotation = torch.linalg.qr(normal(channels, channels, seed=1)).Q
    for same in (x, x @ rotation, 1e-3 * x, x + 5, -7 * x @ rotation - 3):
        assert float(linear_cka(x, same, estimator=estimator)) == pytest.approx(1, abs=1e-12)


def test_unrelated_wide_activations_score_zero_debiased_and_high_biased() -> None:
    scores = {
        e: [linear_cka(normal(32, 2048, seed=s), normal(32, 2048, seed=s + 50), estimator=e) for s in range(8)]
        for e in ESTIMATORS
    }
    assert abs(torch.stack(scores["debiased"]).mean()) < 0.05
    assert min(scores["biased"]) > 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("channels", [4, 40])
def test_cka_is_exact_where_means_are_a_thousand_deviations(channels: int, estimator: str) -> None:
    x, y = ((part / part.std() + 1000).float() for part in related(30, channels, channels + 1))
    expected = gram_cka(x.double() - x.double().mean(0), y.double() - y.double().mean(0), estimator)
    assert float(linear_cka(x, y, estimator=estimator)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_cka_takes_any_real_dtype(dtype: torch.dtype) -> None:
    x, y = ((8 * part).to(dtype) for part in related(10, 4, 3))
    assert float(linear_cka(x, y)) == pytest.approx(gram_cka(x.double(), y.double(), "debiased"), abs=1e-11)


GOOD = normal(8, 3)
NAN = GOOD.clone()
NAN[2, 1], NAN[5, 0] = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("x", "y", "estimator", "words"),
    [
        (GOOD[:, :, None], GOOD, "debiased", r"x must be rows x channels, 2-D .*found shape \(8, 3, 1\)"),
        (GOOD, GOOD[0], "debiased", r"y must be rows x channels.*found shape \(3,\)"),
        (GOOD, GOOD[:, :0], "debiased", r"y must be .*not empty.*found shape \(8, 0\)"),
        (GOOD, GOOD[:7], "debiased", r"x and y must have the same number of rows; found shapes \(8, 3\) and \(7, 3\)"),
        (GOOD[:3], GOOD[:3], "debiased", r"Debiased CKA needs at least 4 rows; found 3 in x\. Use more calibration"),
        (GOOD[:1], GOOD[:1], "biased", r"Biased CKA needs at least 2 rows; found 1"),
        (GOOD, NAN, "debiased", r"y has NaN or infinite values in 2 of its 8 rows"),
        (NAN, GOOD, "biased", r"x has NaN or infinite values in 2 of its 8 rows"),
        (
            torch.full((8, 3), 0.1),
            GOOD,
            "debiased",
            r"x is constant: its 8 rows of 3 channels are equal up to rounding",
        ),
        (GOOD, (1000 + 1e-5 * GOOD).float(), "debiased", r"y is constant"),
        (GOOD, torch.zeros(8, 2), "biased", r"y is constant"),
        (torch.eye(8), GOOD, "debiased", r"x has no debiased similarity to itself: .*its 8 rows.*too few"),
        (1e160 * GOOD, GOOD, "debiased", r"CKA overflows"),
        (1e-90 * GOOD, GOOD, "biased", r"CKA overflows: .*too large or too small"),
    ],
)
def test_cka_says_what_it_cannot_use(x: Tensor, y: Tensor, estimator: str, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        linear_cka(x, y, estimator=estimator)


def test_one_constant_channel_is_no_constant_activation() -> None:
    x = torch.cat([torch.full((8, 1), 1e6), GOOD], dim=1)
    assert float(linear_cka(x, GOOD)) == pytest.approx(1, abs=1e-9)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(StitchError, match=r"no CKA estimator 'unbiased'; choose one of \['debiased', 'biased'\]"):
        linear_cka(GOOD, GOOD, estimator="unbiased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_give_the_same_cka_for_any_batch_size(offset: float, batch_size: int, estimator: str) -> None:
    x, y = related(64, 6, 9)
    order = x[:, 0].argsort()  # so that the batches' means lie far apart
    x, y = (x[order] + offset).float(), (y[order] - offset).float()
    parts = [cka_moments(*batch) for batch in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    expected = float(linear_cka(x, y, estimator=estimator))
    for order_of_merging in (parts, parts[::-1]):
        merged = reduce(merge_cka_moments, order_of_merging)
        assert merged.num_rows == 64
        assert float(cka_from_moments(merged, estimator=estimator)) == pytest.approx(expected, abs=1e-11)


def test_merged_moments_are_those_of_all_rows() -> None:
    x, y = related(30, 4, 3)
    parts = [cka_moments(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 12), (12, 30))]
    whole, first = cka_moments(x, y), parts[0]
    for merged in (reduce(merge_cka_moments, parts), merge_cka_moments(first, merge_cka_moments(*parts[1:]))):
        for name in ("mean", "zz", "sz", "ss"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), atol=1e-10, rtol=1e-10)


def test_moments_say_what_they_cannot_use() -> None:
    good = cka_moments(GOOD, GOOD)
    with pytest.raises(CalibrationError, match=r"same channels \(of x, of y\); found \(3, 3\) and \(3, 2\)"):
        merge_cka_moments(good, cka_moments(GOOD, GOOD[:, :2]))
    with pytest.raises(CalibrationError, match=r"same channels .*found \(3, 3\) and \(2, 4\)"):
        merge_cka_moments(good, cka_moments(GOOD[:, :2], normal(8, 4)))
    with pytest.raises(CalibrationError, match=r"needs at least 4 rows; found 3 in x and y"):
        cka_from_moments(cka_moments(GOOD[:3], GOOD[:3]))
    with pytest.raises(CalibrationError, match="y is constant: its 8 rows of 2 channels"):
        cka_from_moments(cka_moments(GOOD, (1000 + 1e-5 * GOOD[:, :2]).float()))
    with pytest.raises(CalibrationError, match="y has no debiased similarity to itself"):
        cka_from_moments(cka_moments(GOOD, torch.eye(8)))
    with pytest.raises(CalibrationError, match="x has NaN or infinite values in 2 of its 8 rows"):
        cka_moments(NAN, GOOD)
    with pytest.raises(CalibrationError, match=r"x must be .*not empty"):
        cka_moments(GOOD[:0], GOOD[:0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("n", "cx"), [(100, 12), (16, 64), (16, 5)])  # the second in Gram space
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_one_against_many_is_cka_one_by_one(offset: float, n: int, cx: int, estimator: str) -> None:
    pairs = [related(n, cx, cy) for cy in (1, 7, 200, 30)]
    x, ys = (pairs[0][0] + offset).float(), [(y - offset).float() for _, y in pairs]
    expected = torch.stack([linear_cka(x, y, estimator=estimator) for y in ys])
    one, many = centre_rows(x, estimator=estimator), [centre_rows(y, estimator=estimator) for y in ys]
    assert one.rows.dtype == torch.float32
    for entries in (many, row_bank(many)):
        torch.testing.assert_close(cka_with_many(one, entries), expected, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cka_with_many(one, many), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [(5, 5), (1, 40), (15, 60)])
def test_one_against_many_is_exact_for_few_channels_and_many_rows(channels: tuple[int, int]) -> None:
    x, y = (part.relu().float() for part in related(20_000, *channels))
    assert float(cka_with_many(centre_rows(x), [centre_rows(y)])) == pytest.approx(float(linear_cka(x, y)), abs=1e-6)


def test_centred_rows_say_what_they_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="cut 'layer1' is constant"):
        centre_rows(torch.ones(8, 3), name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="needs at least 4 rows; found 3 in cut 'layer1'"):
        centre_rows(GOOD[:3], name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="cut 'layer1' has NaN"):
        centre_rows(NAN, name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="the same rows and estimator; found none"):
        row_bank([])
    one, shorter = centre_rows(GOOD), centre_rows(GOOD[:7])
    with pytest.raises(CalibrationError, match=r"found \[\(7, 'debiased'\), \(8, 'debiased'\)\]"):
        row_bank([one, shorter])
    with pytest.raises(CalibrationError, match=r"found \[\(8, 'debiased'\), \(7, 'debiased'\)\]"):
        cka_with_many(one, [shorter])
    with pytest.raises(CalibrationError, match=r"found \[\(8, 'debiased'\), \(8, 'biased'\)\]"):
        cka_with_many(one, [centre_rows(GOOD, estimator="biased")])
    with pytest.raises(CalibrationError, match="CKA overflows"):  # too large for a product in float32
        cka_with_many(centre_rows(1e25 * normal(8, 20)), [centre_rows(1e25 * normal(8, 20))])


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
