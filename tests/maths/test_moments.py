from __future__ import annotations

import pytest
import torch
from doubles.tensors import normal

from lightning_stitch.maths.leave_one_out import loo_ridge, ridge_weights
from lightning_stitch.maths.moments import RidgeMoments, ridge_of_rows

BLOCKS = {"blocks": [3, 5], "none": None}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("strength", [1e-5, 0.1, 100.0])
@pytest.mark.parametrize("n", [2, 7, 9, 40, 700])
def test_one_strength_by_cholesky_is_that_of_the_decomposition(
    n: int, strength: float, blocks: list[int] | None
) -> None:
    features, targets = normal(n, 8) * 3 + 7, normal(n, 2, seed=1)
    fit = loo_ridge(features, targets, strengths=[strength], blocks=blocks)
    expected, left_out = ridge_weights(fit, strength=strength), fit.predictions[0]
    of_rows, scores = ridge_of_rows(features, targets, strength=strength, blocks=blocks)
    moments = RidgeMoments.of(features, targets).solve(strength=strength, blocks=blocks)
    for found in (of_rows, moments.map):
        torch.testing.assert_close(found.weight, expected.weight, atol=1e-8, rtol=0)
        torch.testing.assert_close(found(features), expected(features), atol=1e-8, rtol=0)
        assert found.ridge == pytest.approx(expected.ridge)
    torch.testing.assert_close(scores, left_out, atol=1e-8, rtol=1e-8)
    if n > 8:
        torch.testing.assert_close(moments.predict_left_out(features, targets), left_out, atol=1e-8, rtol=1e-8)


def test_moments_follow_rows_that_join_and_leave() -> None:
    features, targets = normal(900, 8) * 3 + 7, normal(900, 2, seed=1)
    moments = RidgeMoments.of(features[:300], targets[:300])
    moments.add(features[300:], targets[300:])
    moments.remove(features[:600], targets[:600])
    expected = RidgeMoments.of(features[600:], targets[600:])
    assert moments.num_rows == 300
    for name in ("mean_x", "mean_y", "xx", "xy"):
        torch.testing.assert_close(getattr(moments, name), getattr(expected, name), atol=1e-9, rtol=1e-9)


def test_a_feature_that_varies_no_more_once_rows_left_counts_as_nothing() -> None:
    features, targets = normal(40, 8), normal(40, 2, seed=1)
    features[:30, 2] = 0
    moments = RidgeMoments.of(features, targets)
    moments.remove(features[30:], targets[30:])
    weight = moments.solve(strength=0.1, blocks=[8]).map.weight
    assert not weight[:, 2].any()
    expected, _ = ridge_of_rows(features[:30], targets[:30], strength=0.1, blocks=[8])
    torch.testing.assert_close(weight, expected.weight, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [4, 12])
def test_features_that_do_not_vary_predict_the_mean(n: int) -> None:
    features, targets = torch.full((n, 6), 3.0), normal(n, 2)
    of_rows, left_out = ridge_of_rows(features, targets, strength=1.0)
    for found in (of_rows, RidgeMoments.of(features, targets).solve(strength=1.0).map):
        torch.testing.assert_close(found(features.double()), targets.mean(0).expand(n, 2))
    torch.testing.assert_close(left_out, (targets.sum(0) - targets) / (n - 1))
