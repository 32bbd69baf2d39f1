from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from doubles.tensors import normal
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths import blocks as blocks_module
from lightning_stitch.maths import leave_one_out, rows
from lightning_stitch.maths.blocks import block_gram
from lightning_stitch.maths.leave_one_out import loo_ridge, loo_ridge_of_gram, ridge_weights

STRENGTHS = (1e-4, 0.1, 10.0)


def scaled(features: torch.Tensor, widths: list[int]) -> np.ndarray:
    parts = features.double().split(widths, dim=1)
    return np.concatenate([StandardScaler().fit_transform(part.numpy()) / part.shape[1] ** 0.5 for part in parts], 1)


@pytest.mark.parametrize("module", [blocks_module, leave_one_out])
def test_examples_in_the_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.failed == 0 < result.attempted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "width"), [(2, 1), (7, 300), (300, 7)])
def test_a_blocks_gram_matrix_is_that_of_standardised_rows(n: int, width: int, dtype: torch.dtype) -> None:
    block = (normal(n, width) * 3 + 7).to(dtype)
    z = scaled(block, [width])
    gram = block_gram(block)
    np.testing.assert_allclose(gram.numpy(), z @ z.T, atol=1e-12)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert float(gram.trace()) / n == pytest.approx(1)
    assert torch.equal(gram, block_gram(block))


def test_features_that_vary_by_nothing_or_by_rounding_count_as_nothing() -> None:
    block = normal(20, 4).float()
    third = torch.full((20, 1), 1 / 3)
    rounding = third.where(torch.arange(20)[:, None] % 2 == 0, third.nextafter(torch.tensor(1.0)))
    assert len(rounding.unique()) == 2
    wider = torch.cat([block, torch.full((20, 1), 0.1), torch.zeros(20, 1), rounding], 1)
    torch.testing.assert_close(7 * block_gram(wider), 4 * block_gram(block))
    assert not block_gram(torch.full((5, 2), 3.0)).any()


def test_blocks_that_cannot_be_read_are_named() -> None:
    with pytest.raises(CalibrationError, match="the block must be rows x channels"):
        block_gram(torch.zeros(3))
    with pytest.raises(CalibrationError, match="the block has NaN or infinite values in 1 of its 3 rows"):
        block_gram(torch.tensor([[0.0], [torch.inf], [1.0]]))


@pytest.mark.parametrize(("n", "widths"), [(12, [30, 3, 1]), (25, [4, 3]), (9, [4, 5]), (2, [3, 2])])
def test_leave_one_out_of_blocks_is_ridge_refitted_without_each_row(n: int, widths: list[int]) -> None:
    features, targets = normal(n, sum(widths)) * 5 + 2, normal(n, 2, seed=1)
    gram = sum(block_gram(part) for part in features.split(widths, dim=1))
    assert isinstance(gram, torch.Tensor)
    of_gram = loo_ridge_of_gram(gram, targets, strengths=STRENGTHS)
    of_rows = loo_ridge(features, targets, strengths=STRENGTHS, blocks=widths)
    assert of_gram.strengths == of_rows.strengths == STRENGTHS
    assert of_gram.scale == pytest.approx(of_rows.scale)
    z, y = scaled(features, widths), targets.numpy()  # scaled by all rows
    expected = np.empty((len(STRENGTHS), n, 2))
    for index, strength in enumerate(STRENGTHS):
        for row in range(n):
            others = np.arange(n) != row
            model = Ridge(alpha=strength * of_gram.scale, solver="svd").fit(z[others], y[others])
            expected[index, row] = model.predict(z[row : row + 1])[0]
    np.testing.assert_allclose(of_gram.predictions.numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(of_rows.predictions.numpy(), expected, atol=1e-8)
    errors = np.square(expected - y).sum(1)
    np.testing.assert_allclose(of_gram.errors.numpy(), errors, rtol=1e-8)
    assert of_rows.best_strength == of_gram.best_strength == STRENGTHS[errors.sum(1).argmin()]


def test_a_gram_matrix_may_be_of_rows_that_are_not_centred() -> None:
    features, targets = normal(15, 40), normal(15, 2, seed=1)
    raw = (features + 3) @ (features + 3).T
    expected = loo_ridge(features, targets, strengths=STRENGTHS)
    fit = loo_ridge_of_gram(raw, targets, strengths=STRENGTHS)
    assert fit.scale == pytest.approx(expected.scale)
    torch.testing.assert_close(fit.predictions, expected.predictions, atol=1e-8, rtol=0)
    torch.testing.assert_close(fit.predict_left_out([0.3]), expected.predict_left_out([0.3]), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("n", "widths"), [(12, [30, 3]), (60, [5, 3])])
def test_weights_of_blocks_are_for_raw_features(n: int, widths: list[int]) -> None:
    features, targets = normal(n, sum(widths)) * 5 + 2, normal(n, 2, seed=1)
    fit = loo_ridge(features, targets, strengths=STRENGTHS, blocks=widths)
    z = scaled(features, widths)
    expected = Ridge(alpha=0.1 * fit.scale, solver="svd").fit(z, targets.numpy()).predict(z)
    np.testing.assert_allclose(ridge_weights(fit, strength=0.1)(features).numpy(), expected, atol=1e-9)


def test_duplicated_rows_and_features_change_nothing_but_what_they_should() -> None:
    features, targets = normal(10, 6), normal(10, 1, seed=1)
    twice = torch.cat([features, features], 1)
    once, double = (loo_ridge(x, targets, strengths=STRENGTHS, blocks=[x.shape[1]]) for x in (features, twice))
    penalty = once.scale
    torch.testing.assert_close(
        double.predict_left_out([penalty / double.scale]), once.predict_left_out([1.0]), atol=1e-10, rtol=0
    )
    rows = loo_ridge(features.repeat(2, 1), targets.repeat(2, 1), strengths=[1e-9], blocks=[6])
    torch.testing.assert_close(rows.predictions[0, :10], rows.predictions[0, 10:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("widths", [[], [3, 4], [3, 6], [8, 0], [9, -1]])
def test_blocks_must_be_widths_that_sum_to_the_features(widths: list[int]) -> None:
    with pytest.raises(StitchError, match=r"widths of at least 1 that sum to the 8 features; found \["):
        loo_ridge(normal(5, 8), normal(5, 1), strengths=[1.0], blocks=widths)


def test_gram_matrices_that_cannot_be_used_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"rows x rows; found shape \(5, 3\)"):
        loo_ridge_of_gram(normal(5, 3), normal(5, 1), strengths=[1.0])
    with pytest.raises(CalibrationError, match="the Gram matrix and targets must have the same number of rows"):
        loo_ridge_of_gram(torch.eye(5), normal(4, 1), strengths=[1.0])
    with pytest.raises(CalibrationError, match="at least 2 rows; found 1"):
        loo_ridge_of_gram(torch.eye(1), normal(1, 1), strengths=[1.0])
    with pytest.raises(StitchError, match="positive finite"):
        loo_ridge_of_gram(torch.eye(3), normal(3, 1), strengths=[])
    with pytest.raises(StitchError, match="gives no weights: fit them on the rows"):
        ridge_weights(loo_ridge_of_gram(torch.eye(3), normal(3, 1), strengths=[1.0]), strength=1.0)


@pytest.mark.parametrize("blocks", [[250, 450], None])
def test_the_smaller_gram_matrix_and_portions_change_nothing(
    blocks: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, targets = normal(600, 250) + 5, normal(600, 2, seed=1)
    padded = torch.cat([features, torch.zeros(600, 450)], 1)  # the same problem, but with more features than rows
    tall = loo_ridge(features, targets, strengths=STRENGTHS, blocks=blocks and blocks[:1])
    wide = loo_ridge(padded, targets, strengths=STRENGTHS, blocks=blocks)
    monkeypatch.setattr(rows, "_PORTION", 2**12)
    many = loo_ridge(features, targets, strengths=STRENGTHS, blocks=blocks and blocks[:1])
    assert (tall.problem.wide, wide.problem.wide) == (False, True)
    for strength in STRENGTHS:
        expected = tall.predict_left_out([strength])
        same = strength * tall.scale / wide.scale
        torch.testing.assert_close(wide.predict_left_out([same]), expected, atol=1e-8, rtol=0)
        torch.testing.assert_close(many.predict_left_out([strength]), expected, atol=1e-8, rtol=0)
        weight = ridge_weights(tall, strength=strength).weight
        torch.testing.assert_close(ridge_weights(wide, strength=same).weight[:, :250], weight, atol=1e-8, rtol=0)
        torch.testing.assert_close(ridge_weights(many, strength=strength).weight, weight, atol=1e-8, rtol=0)
