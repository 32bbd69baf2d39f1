from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.tensors import largest_made, normal, related
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths import left_out
from lightning_stitch.maths.left_out import Scaling, block_gram, loo_ridge, loo_ridge_of_gram

GOOD = normal(8, 3)
NAN = GOOD.clone()
NAN[2, 1], NAN[5, 0] = float("nan"), float("inf")

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
        solution = fit.weights(strength)
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
        fit.weights(strengths[-1] if strengths else 0.0)


def test_leave_one_out_says_what_it_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="at least 2 rows; found 1"):
        loo_ridge(GOOD[:1], GOOD[:1], strengths=[1.0])
    with pytest.raises(CalibrationError, match="features has NaN or infinite values in 2 of its 8 rows"):
        loo_ridge(NAN, GOOD, strengths=[1.0])
    with pytest.raises(CalibrationError, match="features and targets must have the same number of rows"):
        loo_ridge(GOOD, GOOD[1:], strengths=[1.0])


BLOCKS = (3, 1, 12)


def scaled(features: Tensor, blocks: tuple[int, ...] = BLOCKS) -> Tensor:
    """Each feature standardised and each block divided by the root of its width, by hand."""
    z = (features - features.mean(0)) / features.std(0, correction=0)
    return torch.cat([block / width**0.5 for block, width in zip(z.split(blocks, 1), blocks, strict=True)], dim=1)


@pytest.mark.parametrize("n", [9, 40])
def test_blocks_are_standardised_and_weigh_alike(n: int) -> None:
    features, targets = related(n, 16, 2)
    features = features * torch.logspace(-2, 2, 16) + 5
    fit = loo_ridge(features, targets, strengths=STRENGTHS, blocks=BLOCKS)
    plain = loo_ridge(scaled(features), targets, strengths=STRENGTHS)
    assert fit.scale == pytest.approx(plain.scale)
    torch.testing.assert_close(fit.predictions, plain.predictions, atol=1e-7, rtol=0)
    solution, reference = fit.weights(0.1), plain.weights(0.1)
    torch.testing.assert_close(solution(features.double()), reference(scaled(features)), atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [9, 40])
def test_a_gram_matrix_says_what_the_features_say(n: int) -> None:
    features, targets = related(n, 16, 2)
    gram = torch.stack([block_gram(block) for block in features.split(BLOCKS, 1)]).sum(0)
    torch.testing.assert_close(gram, scaled(features) @ scaled(features).T)
    assert float(gram.diagonal().mean()) == pytest.approx(len(BLOCKS))
    fit = loo_ridge(features, targets, strengths=STRENGTHS, blocks=BLOCKS)
    of_gram = loo_ridge_of_gram(gram, targets, strengths=STRENGTHS)
    assert of_gram.scale == pytest.approx(fit.scale)
    torch.testing.assert_close(of_gram.predictions, fit.predictions, atol=1e-8, rtol=0)
    torch.testing.assert_close(of_gram.squared_errors, (fit.predictions - targets).square().sum(1))
    with pytest.raises(StitchError, match="those need the features"):
        of_gram.weights(1.0)


@pytest.mark.parametrize("n", [8, 14])
def test_blocks_left_out_are_refits_on_the_same_scale(n: int) -> None:
    features, targets = related(n, 16, 2)
    fit = loo_ridge(features, targets, strengths=[0.01, 1.0], blocks=BLOCKS)
    z, y = scaled(features).numpy(), targets.numpy()
    for strength, predictions in zip(fit.strengths, fit.predictions.numpy(), strict=True):
        for row in range(n):
            others = np.arange(n) != row
            model = Ridge(alpha=strength * fit.scale, solver="svd").fit(z[others], y[others])
            np.testing.assert_allclose(predictions[row], model.predict(z[row : row + 1])[0], atol=1e-8)


def test_long_and_wide_problems_agree_whatever_the_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = related(30, 16, 2)
    expected = loo_ridge(features, targets, strengths=STRENGTHS, blocks=BLOCKS)
    gram = scaled(features) @ scaled(features).T
    torch.testing.assert_close(
        expected.predictions, loo_ridge_of_gram(gram, targets, strengths=STRENGTHS).predictions, atol=1e-8, rtol=0
    )
    monkeypatch.setattr(left_out, "PORTION", 40)
    fit = loo_ridge(features, targets, strengths=STRENGTHS, blocks=BLOCKS)
    torch.testing.assert_close(fit.predictions, expected.predictions, atol=1e-10, rtol=0)
    torch.testing.assert_close(fit.weights(0.1).weight, expected.weights(0.1).weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(3000, 20), (20, 3000)])
def test_no_matrix_of_the_longer_side_is_made(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "PORTION", 2000)
    features, targets = normal(n, d).float(), normal(n, 2)
    with largest_made() as sizes:
        fit = loo_ridge(features, targets, strengths=[0.1, 1.0], blocks=[d // 2, d - d // 2])
        fit.weights(0.1)
        fit.left_out(0.1)
    assert max(sizes) < n * d / 4


def test_a_feature_that_does_not_vary_counts_nothing() -> None:
    features, targets = related(12, 3, 1)
    constant = torch.full((12, 1), 1e4)
    constant[0] += 1e-3  # what rounding in float32 leaves
    joined = torch.cat([features, constant], dim=1).float()
    assert float(Scaling.of(joined, [3, 1]).scale[3]) == 0
    alone = loo_ridge(features.float(), targets, strengths=[0.1], blocks=[3])
    fit = loo_ridge(joined, targets, strengths=[0.1 * 3 / 4], blocks=[3, 1])  # of fewer, the mean eigenvalue is larger
    torch.testing.assert_close(fit.left_out(0.1 * 4 / 3), alone.left_out(0.1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("blocks", [[], [16, 0], [15], [17], [-1, 17]])
def test_blocks_that_are_not_the_features_are_refused(blocks: list[int]) -> None:
    features, targets = related(9, 16, 1)
    with pytest.raises(StitchError, match=r"blocks= are the widths of all 16 features in a row"):
        loo_ridge(features, targets, strengths=[1.0], blocks=blocks)
