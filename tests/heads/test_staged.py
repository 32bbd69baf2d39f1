"""Heads on ever more of a readout, and their thresholds."""

from __future__ import annotations

import pytest
import torch
from doubles.staged import recipe_of_stages
from torch import Tensor

from lightning_stitch import CalibrationError, RecipeError, StitchError, fit_ridge_head
from lightning_stitch.heads import HeadSettings, StagedHead, confidence, thresholds_at
from lightning_stitch.heads.staged import fit_staged_head

RECIPE = recipe_of_stages((4, 3, 5), goes_on=[(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)], point=1)


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of which the first tell some of three classes and the last more of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 12, generator=generator)
    scores = torch.stack([features[:, 0] + features[:, 5], features[:, 1] + features[:, 9], features[:, 8]], dim=1)
    return features, (scores + 0.1 * torch.randn(count, 3, generator=generator)).argmax(1)


def test_each_stage_is_the_ridge_head_of_the_taps_so_far() -> None:
    features, targets = rows(90)
    staged, fit = fit_staged_head(features, targets, RECIPE, num_classes=3)
    for number, (width, blocks) in enumerate(((4, None), (7, [4, 3]), (12, [4, 3, 5]))):
        expected, of_last = fit_ridge_head(features[:, :width], targets, num_classes=3, blocks=blocks)
        torch.testing.assert_close(staged.heads[number].state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert fit == of_last


def test_thresholds_let_as_many_go_on_as_the_recipe_says_of_rows_left_out() -> None:
    features, targets = rows(80)
    staged, _ = fit_staged_head(features, targets, RECIPE, num_classes=3)
    left_out = [
        fit_ridge_head(features[:, :width], targets, num_classes=3, blocks=blocks)[1].left_out
        for width, blocks in ((4, None), (7, [4, 3]))
    ]
    first, second = (confidence(x, "multiclass") for x in left_out if x is not None)
    going = first < staged.thresholds[0]
    assert int(going.sum()) == 40
    assert int((second[going] < staged.thresholds[1]).sum()) == 10
    assert staged.settings[0].tolist() == [-torch.inf, -torch.inf]
    assert staged.settings[2].tolist() == [torch.inf, torch.inf]


def test_a_row_gets_the_answer_of_the_first_stage_that_is_sure_and_in_training_the_last() -> None:
    features, targets = rows(80)
    staged, _ = fit_staged_head(features, targets, RECIPE, num_classes=3)
    new, _ = rows(60, seed=1)
    outputs, stops = staged.outputs(new), staged.stops(new)
    assert set(stops.tolist()) == {0, 1, 2}
    for row, stage in enumerate(stops.tolist()):
        assert torch.equal(staged(new)[row], outputs[stage][row])
        assert staged.is_sure(stage, outputs[stage])[row]
        assert not any(staged.is_sure(before, outputs[before])[row] for before in range(stage))
    assert torch.equal(staged.train()(new), outputs[-1])


@pytest.mark.parametrize(
    ("sure", "share", "expected"),
    [
        ([4.0, 1.0, 2.0, 3.0], 0.5, 2.5),
        ([4.0, 1.0, 2.0, 3.0], 0.0, -torch.inf),
        ([4.0, 1.0, 2.0, 3.0], 1.0, torch.inf),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 1.0),  # all stop: none is less sure
    ],
)
def test_a_threshold_lies_between_the_last_that_goes_on_and_the_first_that_stops(
    sure: list[float], share: float, expected: float
) -> None:
    assert thresholds_at([torch.tensor(sure)], [share]).tolist() == [expected]


def test_where_no_row_arrives_any_threshold_does() -> None:
    assert thresholds_at([torch.ones(3), torch.ones(3)], [0.0, 0.5])[0] == -torch.inf


def test_labels_are_as_sure_as_the_least_sure_of_them() -> None:
    outputs = torch.tensor([[3.0, -2.0], [0.1, 9.0], [-0.5, -4.0]])
    torch.testing.assert_close(confidence(outputs, "multilabel"), torch.tensor([2.0, 0.1, 0.5]))


def test_numbers_go_on_where_their_residuals_are_expected_to_be_large() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 12, generator=generator)
    noisy = (features[:, 1] > 0).float()
    targets = features[:, 0] + (0.05 + 2 * noisy) * torch.randn(400, generator=generator)
    staged, fit = fit_staged_head(features[:300], targets[:300], RECIPE, num_classes=1, task="regression")
    going = staged.stops(features[300:]) > 0
    assert noisy[300:][going].mean() > 0.8 > 0.3 > noisy[300:][~going].mean()
    assert staged(features).shape == (400, 1)
    assert fit.left_out is not None
    assert fit.left_out.shape == (300, 1)


def test_several_labels_have_stages_too() -> None:
    features, targets = rows(90)
    labels = torch.stack([targets == 0, targets == 2], dim=1).long()
    staged, _ = fit_staged_head(features, labels, RECIPE, num_classes=2, task="multilabel")
    assert staged(features).shape == (90, 2)
    assert set(staged.stops(features).tolist()) == {0, 1, 2}


def test_what_left_out_rows_would_get_is_what_refits_without_them_give() -> None:
    features, targets = rows(40)
    _, fit = fit_ridge_head(features, targets, num_classes=3, strengths=[0.1])
    assert fit.left_out is not None
    assert fit.temperature is not None
    scale = 0.1 * (features.double() - features.double().mean(0)).square().sum() / 12
    for row in (0, 7):
        rest = torch.arange(40) != row
        x, y = features[rest].double(), torch.nn.functional.one_hot(targets[rest], 3).double()
        centred = x - x.mean(0)
        weight = torch.linalg.solve(centred.T @ centred + scale * torch.eye(12).double(), centred.T @ (y - y.mean(0)))
        expected = fit.temperature * ((features[row].double() - x.mean(0)) @ weight + y.mean(0))
        torch.testing.assert_close(fit.left_out[row], expected, rtol=1e-8, atol=1e-8)


def test_only_ridge_heads_have_stages() -> None:
    features, targets = rows(30)
    settings = HeadSettings.of("knn", num_classes=3)
    for refused in (lambda: settings.empty_for(RECIPE), lambda: settings.fit_for(RECIPE, features, targets)):
        with pytest.raises(RecipeError, match="Stages have ridge heads"):
            refused()
    ridge = HeadSettings.of("ridge", num_classes=3)
    with pytest.raises(StitchError, match="these have no labels"):
        ridge.fit_for(RECIPE, features, None)
    with pytest.raises(CalibrationError, match="one target"):
        ridge.fit_for(RECIPE, features, targets[1:])
    assert isinstance(ridge.empty_for(RECIPE), StagedHead)
