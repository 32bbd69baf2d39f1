from __future__ import annotations

import doctest
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from doubles.tensors import normal
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import neighbours
from lightning_stitch.heads.neighbours import Metric, NearestNeighbourHead, fit_neighbour_head
from lightning_stitch.heads.targets import Task

FEATURES = normal(40, 6) * torch.tensor([1, 10, 0.1, 3, 1, 1]) + 4
QUERIES = normal(15, 6, seed=1) * torch.tensor([1, 10, 0.1, 3, 1, 1]) + 4
CLASSES = torch.arange(40) % 3
LABELS = torch.stack([CLASSES == 0, FEATURES[:, 1] > 0, FEATURES[:, 0] > 4], 1).long()
NUMBERS = FEATURES[:, :2] * 50
EVEN = 1e6  # a temperature at which all neighbours count alike


def standardised(x: Tensor) -> np.ndarray:
    return ((x - FEATURES.mean(0)) / FEATURES.std(0, correction=0)).numpy()


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(neighbours) == (0, 3)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5])
def test_even_votes_are_those_of_scikit_learn_on_standardised_features(metric: Metric, k: int) -> None:
    head = fit_neighbour_head(FEATURES, CLASSES, num_classes=4, metric=metric, num_neighbours=k, temperature=EVEN)
    reference = KNeighborsClassifier(k, metric=metric).fit(standardised(FEATURES), CLASSES)
    votes = torch.zeros(15, 4).double()
    votes[:, :3] = torch.from_numpy(reference.predict_proba(standardised(QUERIES)))
    probabilities = head(QUERIES.float()).double().exp()
    torch.testing.assert_close(probabilities, (40 * votes + 1 / 4) / 41, rtol=1e-4, atol=1e-5)


def test_even_averages_of_numbers_and_labels_are_those_of_scikit_learn() -> None:
    options: dict[str, Any] = {"num_neighbours": 4, "temperature": EVEN, "metric": "euclidean"}
    head = fit_neighbour_head(FEATURES, NUMBERS, num_classes=2, task="regression", **options)
    reference = KNeighborsRegressor(4).fit(standardised(FEATURES), NUMBERS)
    np.testing.assert_allclose(head(QUERIES.float()), reference.predict(standardised(QUERIES)), rtol=1e-4, atol=1e-2)
    head = fit_neighbour_head(FEATURES, LABELS, num_classes=3, task="multilabel", **options)
    shares = reference.fit(standardised(FEATURES), LABELS).predict(standardised(QUERIES))
    np.testing.assert_allclose(head(QUERIES.float()).sigmoid(), (40 * shares + 0.5) / 41, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_votes_weigh_as_the_exponential_of_their_similarity(metric: Metric) -> None:
    head = fit_neighbour_head(
        FEATURES, NUMBERS[:, 0], num_classes=1, task="regression", metric=metric, num_neighbours=39, temperature=0.2
    )
    x, rows = (torch.from_numpy(standardised(part)) for part in (QUERIES, FEATURES))
    cosine = F.cosine_similarity(x[:, None], rows[None], dim=2)
    similarity = cosine if metric == "cosine" else -torch.cdist(x, rows).square() / 12
    nearest = similarity >= similarity.topk(39).values[:, -1:]
    weights = ((similarity / 0.2).exp() * nearest).double()
    expected = weights @ NUMBERS[:, :1] / weights.sum(1, keepdim=True)
    torch.testing.assert_close(head(QUERIES.float()).double(), expected, rtol=1e-3, atol=1e-2)


def loss_without_each_row(head: NearestNeighbourHead, targets: Tensor, task: Task) -> float:
    outputs = []
    for row in range(40):
        others = torch.arange(40) != row
        alone = NearestNeighbourHead(6, head.targets.shape[1], task=task)
        alone.load_state_dict({**head.state_dict(), "rows": head.rows[others], "targets": head.targets[others]})
        outputs.append(alone(FEATURES[row : row + 1].float())[0])
    given = torch.stack(outputs).double()
    if task == "multiclass":
        return float(F.cross_entropy(given, targets))
    if task == "multilabel":
        return float(F.binary_cross_entropy_with_logits(given, targets.double()))
    return float(((given - targets) / targets.std(0)).square().mean())


@pytest.mark.parametrize(
    ("task", "targets"), [("multiclass", CLASSES), ("multilabel", LABELS), ("regression", NUMBERS)]
)
def test_number_and_temperature_have_the_least_loss_of_heads_without_each_row(task: Task, targets: Tensor) -> None:
    options: dict[str, Any] = {"num_classes": 2 if task == "regression" else 3, "task": task}
    losses = {}
    for k, t in product((1, 2, 3, 5, 8, 12, 20, 30), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)):
        head = fit_neighbour_head(FEATURES, targets, num_neighbours=k, temperature=t, **options)
        assert (int(head.num_neighbours), float(head.temperature)) == (k, pytest.approx(t))
        losses[k, t] = loss_without_each_row(head, targets, task)
    chosen = fit_neighbour_head(FEATURES, targets, **options)
    best = min(losses, key=lambda pair: losses[pair])
    assert (int(chosen.num_neighbours), float(chosen.temperature)) == (best[0], pytest.approx(best[1]))


def test_a_small_given_number_is_chosen_where_only_the_nearest_knows() -> None:
    centres = 10 * normal(12, 6, seed=5)
    features = centres.repeat(2, 1) + 0.01 * normal(24, 6, seed=6)
    targets = torch.arange(12).repeat(2) % 2
    head = fit_neighbour_head(features, targets, num_classes=2)
    assert torch.equal(head((centres + 0.01 * normal(12, 6, seed=7)).float()).argmax(1), targets[:12])
    assert int(head.num_neighbours) == 1 or float(head.temperature) < 0.2


def test_an_empty_head_takes_as_many_rows_as_a_state_dict_has_and_then_gives_the_same() -> None:
    head = fit_neighbour_head(FEATURES, CLASSES, num_classes=3)
    again = NearestNeighbourHead(6, 3)
    again.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(again(QUERIES.float()), head(QUERIES.float()))
    assert repr(again) == f"NearestNeighbourHead(in_features=6, num_classes=3, rows=40, k={head.num_neighbours})"
    nested = torch.nn.Sequential(torch.nn.Identity(), NearestNeighbourHead(6, 3))
    nested.load_state_dict(torch.nn.Sequential(torch.nn.Identity(), head).state_dict())
    assert torch.equal(nested(QUERIES.float()), head(QUERIES.float()))
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        NearestNeighbourHead(7, 3).load_state_dict(head.state_dict())


def test_an_empty_head_says_that_it_is_empty() -> None:
    with pytest.raises(StitchError, match="holds no images yet: fit it, or load a state dict"):
        NearestNeighbourHead(6, 3)(QUERIES.float())


def test_gradients_reach_the_network_before_it() -> None:
    with torch.inference_mode():
        head = fit_neighbour_head(FEATURES.clone(), CLASSES, num_classes=3, num_neighbours=8)
    x = QUERIES.float().requires_grad_()
    F.cross_entropy(head(x), torch.arange(15) % 3).backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert not list(head.parameters())


def test_a_feature_that_does_not_vary_counts_for_nothing() -> None:
    wider = torch.cat([FEATURES, torch.full((40, 1), 3.0)], 1)
    head = fit_neighbour_head(wider, CLASSES, num_classes=3, metric="cosine")
    plain = fit_neighbour_head(FEATURES, CLASSES, num_classes=3, metric="cosine")
    assert (head.num_neighbours, head.temperature) == (plain.num_neighbours, plain.temperature)
    queries = torch.cat([QUERIES, torch.full((15, 1), 3.0)], 1)
    torch.testing.assert_close(head(queries.float()), plain(QUERIES.float()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_neighbours": 0}, StitchError, "num_neighbours must be at least 1; found 0"),
        ({"num_neighbours": 40}, CalibrationError, "40 others vote, needs at least 41 rows; found 40"),
        ({"temperature": 0.0}, StitchError, "temperature must be a positive finite number"),
        ({"metric": "manhattan"}, StitchError, "metric must be one of .*found 'manhattan'"),
        (
            {"features": FEATURES[1:]},
            CalibrationError,
            r"same number of rows; found shapes \(39, 6\) and \(40, 3\)",
        ),
        ({"features": FEATURES.where(FEATURES < 9, torch.nan)}, CalibrationError, "NaN or infinite values in"),
    ],
)
def test_what_cannot_be_fitted_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    features = options.pop("features", FEATURES)
    with pytest.raises(error, match=words):
        fit_neighbour_head(features, CLASSES, num_classes=3, **options)
