from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from doubles.tensors import normal
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import class_means
from lightning_stitch.heads.class_means import ClassMeanHead, fit_class_mean_head
from lightning_stitch.heads.neighbours import Metric

TARGETS = torch.tensor([0, 1, 2, 1, 2, 2] * 8)
FEATURES = normal(3, 5, seed=1)[TARGETS] * 1.5 + normal(48, 5) + 20
QUERIES = normal(3, 5, seed=1).repeat(5, 1) + normal(15, 5, seed=3) + 20


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(class_means) == (0, 3)


def test_the_nearest_mean_is_that_of_scikit_learn_and_logits_are_squared_distances() -> None:
    head, fit = fit_class_mean_head(FEATURES, TARGETS, num_classes=3)
    reference = NearestCentroid().fit(FEATURES, TARGETS)
    logits = head(QUERIES.float()).detach()
    assert np.array_equal(logits.argmax(1), reference.predict(QUERIES))
    squared = torch.cdist(QUERIES, torch.from_numpy(reference.centroids_)).square()
    torch.testing.assert_close(
        logits.softmax(1).double(), (-fit.temperature * squared).softmax(1), rtol=1e-3, atol=1e-5
    )


def test_the_cosine_is_about_the_mean_of_all_rows() -> None:
    head, fit = fit_class_mean_head(FEATURES, TARGETS, num_classes=3, metric="cosine")
    centre = FEATURES.mean(0)
    means = torch.stack([FEATURES[c == TARGETS].mean(0) for c in range(3)]) - centre
    expected = fit.temperature * F.cosine_similarity((QUERIES - centre)[:, None], means[None], dim=2)
    torch.testing.assert_close(head(QUERIES.float()).detach().double(), expected, rtol=1e-3, atol=1e-4)


def left_out_logits(metric: Metric, temperature: float, targets: Tensor) -> Tensor:
    centre, rows = FEATURES.mean(0), []
    for row in range(48):
        others = torch.arange(48) != row
        means = torch.stack([FEATURES[others & (targets == c)].mean(0) for c in range(3)])
        x = FEATURES[row]
        if metric == "cosine":
            rows.append(F.cosine_similarity((x - centre)[None], means - centre))
        else:
            rows.append(-(x - means).square().sum(1))
    return temperature * torch.stack(rows)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_leave_one_out_figures_are_those_of_means_without_each_row(metric: Metric) -> None:
    _, fit = fit_class_mean_head(FEATURES, TARGETS, num_classes=3, metric=metric)
    logits = left_out_logits(metric, fit.temperature, TARGETS)
    assert fit.loo_accuracy == pytest.approx(float((logits.argmax(1) == TARGETS).double().mean()))
    assert fit.loo_log_loss == pytest.approx(float(F.cross_entropy(logits, TARGETS)))
    assert fit.num_rows == 48


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_temperature_has_the_least_smoothed_loss_whatever_the_features_scale(metric: Metric, scale: float) -> None:
    _, fit = fit_class_mean_head(scale * FEATURES, TARGETS, num_classes=3, metric=metric)
    scores = left_out_logits(metric, 1.0, TARGETS)
    smoothed = (48 * F.one_hot(TARGETS) + 1 / 3) / 49
    grid = torch.logspace(-3, 3, 1001, dtype=torch.float64)
    best = grid[torch.stack([F.cross_entropy(factor * scores, smoothed) for factor in grid]).argmin()]
    unit = scale**2 if metric == "euclidean" else 1
    assert fit.temperature * unit == pytest.approx(float(best), rel=0.02)


def test_a_row_that_is_alone_in_its_class_counts_as_wrong() -> None:
    targets = TARGETS.where(torch.arange(48) > 0, 3)
    _, fit = fit_class_mean_head(FEATURES, targets, num_classes=4)
    _, without = fit_class_mean_head(FEATURES[1:], targets[1:], num_classes=3)
    assert fit.loo_accuracy <= without.loo_accuracy * 47 / 48 + 1e-9
    _, single = fit_class_mean_head(FEATURES[:3], torch.tensor([0, 1, 2]), num_classes=3)
    assert (single.loo_accuracy, single.loo_log_loss, single.temperature) == (0, None, 1)


def test_means_can_be_trained_and_a_state_dict_brings_them_back() -> None:
    with torch.inference_mode():
        head, _ = fit_class_mean_head(FEATURES.clone(), TARGETS, num_classes=3)
    loss = F.cross_entropy(head(FEATURES.float()), TARGETS)
    loss.backward()
    torch.optim.SGD(head.parameters(), lr=0.01).step()
    assert F.cross_entropy(head(FEATURES.float()), TARGETS) < loss
    again = ClassMeanHead(5, 3)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(QUERIES.float()), head(QUERIES.float()))
    assert repr(again) == "ClassMeanHead(in_features=5, num_classes=3, metric='euclidean')"


def test_what_has_no_mean_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"The classes \[3, 4\] have no row.*or use a ridge head"):
        fit_class_mean_head(FEATURES, TARGETS, num_classes=5)
    with pytest.raises(CalibrationError, match="1 of its 48 rows"):
        fit_class_mean_head(FEATURES.where(FEATURES.max() > FEATURES, torch.inf), TARGETS, num_classes=3)
    with pytest.raises(CalibrationError, match=r"shape \(47, 5\) and 48 targets"):
        fit_class_mean_head(FEATURES[1:], TARGETS, num_classes=3)
    with pytest.raises(StitchError, match="found 'chebyshev'"):
        fit_class_mean_head(FEATURES, TARGETS, num_classes=3, metric="chebyshev")  # type: ignore[arg-type]
