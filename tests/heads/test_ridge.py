from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import ridge as heads
from lightning_stitch.heads.ridge import DEFAULT_STRENGTHS, RidgeHead, fit_ridge_head


def blobs(n: int, d: int, num_classes: int, *, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % num_classes
    centres = torch.randn(num_classes, d, generator=generator)
    return centres[targets] + spread * torch.randn(n, d, generator=generator), targets


def refitted_scores(features: Tensor, targets: Tensor, num_classes: int, penalty: float) -> Tensor:
    """Scores of every row by scikit-learn, fitted on all rows but that one."""
    x, y = features.double().numpy(), F.one_hot(targets, num_classes).double().numpy()
    rows = []
    for row in range(len(x)):
        others = np.arange(len(x)) != row
        rows.append(Ridge(alpha=penalty).fit(x[others], y[others]).predict(x[row : row + 1])[0])
    return torch.from_numpy(np.stack(rows))


def penalty_of(features: Tensor, strength: float) -> float:
    centred = features.double() - features.double().mean(0)
    return strength * float(centred.square().sum()) / min(len(features) - 1, features.shape[1])


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(heads) == (0, 3)


def test_a_new_head_is_zero_and_trainable() -> None:
    head = RidgeHead(4, 3)
    assert dict(head.named_parameters()).keys() == {"weight", "bias"}
    assert head.weight.shape == (3, 4)
    assert head.bias.shape == (3,)
    assert all(parameter.requires_grad and not parameter.any() for parameter in head.parameters())
    assert head(torch.randn(5, 4)).shape == (5, 3)
    assert repr(head) == "RidgeHead(in_features=4, num_classes=3)"


@pytest.mark.parametrize(("n", "d"), [(40, 6), (20, 50)])
def test_scores_are_those_of_refits_without_each_row(n: int, d: int) -> None:
    features, targets = blobs(n, d, 3, spread=1.5)
    _, fit = fit_ridge_head(features, targets, num_classes=4)  # class 3 does not occur
    scores = refitted_scores(features, targets, 4, penalty_of(features, fit.strength))
    assert fit.num_rows == n
    assert fit.loo_accuracy == pytest.approx(float((scores.argmax(1) == targets).double().mean()))
    one_hot = F.one_hot(targets, 4).double()
    errors = (scores - one_hot).square().sum() / (one_hot - one_hot.mean(0)).square().sum()
    assert fit.loo_r2 == pytest.approx(1 - float(errors))
    assert fit.loo_log_loss == pytest.approx(float(F.cross_entropy(fit.temperature * scores, targets)), abs=1e-6)


@pytest.mark.parametrize("spread", [0.3, 1.5, 6.0])
def test_strength_is_the_choice_of_ridge_cv(spread: float) -> None:
    features, targets = blobs(40, 30, 3, spread=spread)
    _, fit = fit_ridge_head(features, targets, num_classes=3)
    penalties = [penalty_of(features, strength) for strength in DEFAULT_STRENGTHS]
    reference = RidgeCV(penalties).fit(features.double().numpy(), F.one_hot(targets).double().numpy())
    assert penalty_of(features, fit.strength) == pytest.approx(reference.alpha_)


@pytest.mark.parametrize("spread", [0.05, 1.5, 6.0])
def test_temperature_has_the_least_smoothed_log_loss(spread: float) -> None:
    features, targets = blobs(40, 6, 3, spread=spread)
    _, fit = fit_ridge_head(features, targets, num_classes=3)
    scores = refitted_scores(features, targets, 3, penalty_of(features, fit.strength))
    smoothed = (40 * F.one_hot(targets) + 1 / 3) / 41
    grid = torch.logspace(-3, 3, 601, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(factor * scores, smoothed) for factor in grid])
    assert fit.temperature == pytest.approx(float(grid[losses.argmin()]), rel=0.02)


def test_a_head_is_the_refit_on_all_rows_times_its_temperature() -> None:
    features, targets = blobs(40, 60, 3, spread=1.5)
    head, fit = fit_ridge_head(features + 10, targets, num_classes=3)
    reference = Ridge(alpha=penalty_of(features, fit.strength))
    reference.fit(features.double().numpy() + 10, F.one_hot(targets).double().numpy())
    np.testing.assert_allclose(head.weight.detach().numpy(), fit.temperature * reference.coef_, atol=1e-4)
    expected = fit.temperature * reference.predict(features.double().numpy() + 10)
    np.testing.assert_allclose(head(features + 10).detach().numpy(), expected, atol=1e-3)
    assert head.weight.dtype == head.bias.dtype == torch.float32
    assert fit_ridge_head(features + 10, targets, num_classes=3)[1] == fit


def test_digits_are_told_apart_with_usable_probabilities() -> None:
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = (torch.from_numpy(array)[order] for array in load_digits(return_X_y=True))
    head, fit = fit_ridge_head(images[:500].float(), labels[:500], num_classes=10)
    log_probabilities = head(images[500:].float()).detach().log_softmax(1)
    accuracy = float((log_probabilities.argmax(1) == labels[500:]).double().mean())
    assert fit.loo_accuracy > 0.9
    assert accuracy > 0.88
    assert float(F.nll_loss(log_probabilities, labels[500:])) < 0.5  # 2.3 for a guess
    confidence = float(log_probabilities.exp().amax(1).double().mean())
    assert confidence == pytest.approx(accuracy, abs=0.06)


def test_classes_told_apart_without_error_get_finite_logits() -> None:
    features, targets = blobs(32, 4, 2, spread=0.01)
    head, fit = fit_ridge_head(features, targets, num_classes=2)
    assert fit.loo_accuracy == 1
    probabilities = head(features).detach().softmax(1).amax(1)
    assert 0.9 < float(probabilities.min()) <= float(probabilities.max()) < 0.9999


def test_noise_gets_probabilities_near_the_share_of_each_class() -> None:
    features = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1))
    head, fit = fit_ridge_head(features, targets, num_classes=3)
    assert fit.loo_log_loss == pytest.approx(np.log(3), abs=0.03)
    torch.testing.assert_close(head(features).softmax(1), torch.full((300, 3), 1 / 3), atol=0.15, rtol=0)


def test_a_head_can_be_trained_on_even_when_fitted_in_inference_mode() -> None:
    features, targets = blobs(30, 8, 3, spread=2.0)
    with torch.inference_mode():
        head, _ = fit_ridge_head(features.clone(), targets, num_classes=3)
    before = F.cross_entropy(head(features), targets)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    before.backward()
    optimizer.step()
    assert F.cross_entropy(head(features), targets) < before


def test_fits_leave_no_graph_behind() -> None:
    features, targets = blobs(30, 8, 3, spread=2.0)
    head, _ = fit_ridge_head(features.requires_grad_(), targets, num_classes=3)
    assert head.weight.is_leaf
    assert features.grad is None


def test_fits_repeat_and_take_any_integer_dtype_and_strengths() -> None:
    features, targets = blobs(30, 8, 3, spread=2.0)
    assert (
        fit_ridge_head(features, targets, num_classes=3)[1]
        == fit_ridge_head(features, targets.to(torch.uint8), num_classes=3)[1]
    )
    assert fit_ridge_head(features, targets, num_classes=3, strengths=[0.5])[1].strength == 0.5
    assert fit_ridge_head(features, targets, num_classes=3, strengths=(2.0,))[1].strength == 2.0


ROWS = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("features", "targets", "words"),
    [
        (ROWS[:0], LABELS[:0], "A head needs labelled rows to be fitted; found none"),
        (ROWS, LABELS * 0 + 1, r"at least two classes; all 6 targets are 1\. Shuffle"),
        (ROWS, LABELS * 2, r"Targets must lie from 0 to 1 \(num_classes=2\); found 0 to 2"),
        (ROWS, LABELS - 1, "found -1 to 0"),
        (ROWS, LABELS[:5], "Each row needs one target; found 6 rows and 5 targets"),
        (ROWS, LABELS.float(), r"class indices, one integer for each row; found torch.float32 of shape \(6,\)"),
        (ROWS, F.one_hot(LABELS), r"class indices.*shape \(6, 2\)"),
        (ROWS.where(ROWS > 0, torch.nan), LABELS, "features has NaN or infinite values in . of its 6 rows"),
        (ROWS[:, :, None], LABELS, r"features must be rows x channels.*found shape \(6, 2, 1\)"),
    ],
)
def test_what_cannot_be_fitted_is_named(features: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        fit_ridge_head(features, targets, num_classes=2)


def test_strengths_must_be_positive() -> None:
    with pytest.raises(StitchError, match="Ridge strengths must be one or more positive finite numbers"):
        fit_ridge_head(ROWS, LABELS, num_classes=2, strengths=[])
