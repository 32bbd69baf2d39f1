from __future__ import annotations

import pytest
import torch
from doubles.outcomes import selection_of
from doubles.pools import bare_candidate as candidate
from doubles.references import left_out_predictions, left_out_r2
from doubles.small_sources import plain
from doubles.tensors import digits, normal
from torch import Tensor

from lightning_stitch.composing.pool import Pool
from lightning_stitch.progress import Silent, num_images
from lightning_stitch.search.ranking import RANKINGS
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.candidates import Candidate
from lightning_stitch.stitching.images import WithoutLabels

SIGNAL = normal(30, 3)
LABELS = (SIGNAL + normal(30, 3, seed=1) > 0).long()
NUMBERS = torch.stack([SIGNAL[:, 0] * 1000, SIGNAL[:, 1] - 7], 1).float()
FEATURES = [
    (SIGNAL @ normal(3, 5, seed=seed) + noise * normal(30, 5, seed=seed + 9)) for seed, noise in ((2, 0.3), (3, 3))
]
CANDIDATES = [candidate(kind="source"), candidate()]


def columns(targets: Tensor) -> Tensor:
    if not targets.is_floating_point():
        return targets.double()
    wide = targets.double().reshape(30, -1)
    return (wide - wide.mean(0)) / wide.std(0, correction=0)


@pytest.mark.parametrize("targets", [LABELS, NUMBERS, NUMBERS[:, 0]])
def test_labels_and_numbers_are_ranked_by_leave_one_out_r2_each_number_counting_alike(targets: Tensor) -> None:
    selection = selection_of(FEATURES, targets, [FEATURES[0]] * 2, None)
    expected = [left_out_r2(x, columns(targets).numpy()) for x in FEATURES]
    scores = RANKINGS["loo_r2"](CANDIDATES, selection)
    assert [list(score) for score in scores] == [["loo_r2"]] * 2
    assert [score["loo_r2"] for score in scores] == pytest.approx(expected)
    assert expected[0] > expected[1]


@pytest.mark.parametrize("targets", [LABELS, NUMBERS])
def test_labels_and_numbers_are_softened_by_what_the_sources_say(targets: Tensor) -> None:
    selection = selection_of(FEATURES, targets, [FEATURES[0]] * 2, targets.shape[1])
    y = columns(targets).numpy()
    soft = (y + left_out_predictions(FEATURES[0], y)) / 2
    scores = RANKINGS["loo_soft_r2"](CANDIDATES, selection)
    assert [score["loo_soft_r2"] for score in scores] == pytest.approx([left_out_r2(x, soft) for x in FEATURES])
    assert [list(score) for score in scores] == [["loo_soft_r2", "loo_r2"]] * 2


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_search_finds_the_networks_whose_features_say_most_of_such_targets(task: str) -> None:
    pool = Pool(
        [plain("a", (8, 9, 10), seed=0), plain("b", (4, 4, 4), seed=1)],
        (3, 16, 16),
        settings=CalibrationSettings(readout="last"),
    )
    images, classes = digits(60, 16, first=40)
    bits = torch.stack([classes % 2, classes // 5, (classes == 3).long()], 1)
    targets = bits if task == "multilabel" else classes.float() * 100
    result = pool.search([digits(16, 16)[0]], [(images[:25], targets[:25]), (images[25:], targets[25:])])
    assert list(result.best.scores) == ["loo_soft_r2", "loo_r2"]
    assert result.num_selection_labels == 60

    def r2_of(found: Candidate) -> float:
        outcomes, _ = pool.outcomes([found], [images], progress=Silent())
        y = (
            bits.double()
            if task == "multilabel"
            else (targets[:, None].double() - targets.mean()) / targets.std(0, False)
        )
        x = outcomes[0].features.double()
        if outcomes[0].blocks is None:
            return left_out_r2(x, y.numpy())
        widths, deviation = torch.tensor(outcomes[0].blocks), x.std(0, correction=0)
        deviation[deviation < 1e-6] = torch.inf
        return left_out_r2(x / deviation / widths.repeat_interleave(widths).sqrt(), y.numpy())

    for ranked in (result.best, result.ranked[-1]):
        assert ranked.scores["loo_r2"] == pytest.approx(r2_of(ranked.candidate), abs=1e-6)


def test_batches_without_labels_are_the_images_alone_and_can_be_read_again() -> None:
    images, classes = digits(10, 16)
    bare = WithoutLabels([(images[:6], classes[:6]), images[6:]])
    for _ in range(2):
        assert torch.equal(torch.cat(list(bare)), images)
    assert num_images(bare) is None
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), batch_size=4)
    assert num_images(WithoutLabels(loader)) == 10
