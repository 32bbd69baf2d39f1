from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.tensors import normal, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_stitch import RidgeLearner, fit_ridge_head
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import ridge_learner
from lightning_stitch.heads.ridge import RidgeHead
from lightning_stitch.heads.targets import Task

TASKS: tuple[Task, ...] = ("multiclass", "multilabel", "regression")
POOL = normal(400, 30, seed=3).float() * torch.linspace(0.1, 5, 30) + 3
TRUTH = POOL[:, :3] @ normal(3, 3, seed=4).float() + 0.5 * normal(400, 3, seed=5).float()
DEVIATIONS = (TRUTH - TRUTH.mean(0)) / TRUTH.std(0)
TARGETS = {"multiclass": DEVIATIONS.argmax(1), "multilabel": (DEVIATIONS > 0).long(), "regression": TRUTH}


def check_same(head: RidgeHead, expected: RidgeHead) -> None:
    for found, wanted in zip(head.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6 * float(wanted.detach().abs().max()), rtol=1e-6)


def refitted(rows: list[int], task: Task, learner: RidgeLearner) -> RidgeHead:
    targets = TARGETS[task][rows]
    options: dict[str, Any] = {"num_classes": 3, "task": task, "blocks": learner.blocks}
    return fit_ridge_head(POOL[rows], targets, strengths=[learner.strength], **options)[0]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(ridge_learner, extraglobs={"torch": torch}) == (0, 5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("blocks", [(4, 26), None])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_updates_and_forgets_gives_the_refit_on_the_rows_there_are(
    task: Task, blocks: tuple[int, ...] | None, seed: int
) -> None:
    generator = seeded(seed)
    rows, waiting = list(range(12)), list(range(12, 400))
    learner = RidgeLearner(POOL[rows], TARGETS[task][rows], num_classes=3, task=task, blocks=blocks)
    sizes = []
    for _ in range(25):
        count = int(torch.randint(1, 20, (), generator=generator))
        if torch.rand((), generator=generator) < 0.6 or len(rows) < count + 10:
            rows, batch, waiting = rows + waiting[:count], waiting[:count], waiting[count:]
            learner.update(POOL[batch], TARGETS[task][batch])
        else:
            places = torch.randperm(len(rows), generator=generator)[:count]
            learner.forget(places)
            gone = set(places.tolist())
            waiting += [row for place, row in enumerate(rows) if place in gone]
            rows = [row for place, row in enumerate(rows) if place not in gone]
        sizes.append(len(rows))
        assert learner.num_rows == len(rows)
        check_same(learner.head, refitted(rows, task, learner))
    assert min(sizes) <= 30 < max(sizes)  # both with more features than rows and with fewer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("blocks", [(4, 26), None])
def test_without_rows_it_is_the_refit_up_to_the_first_calibration(task: Task, blocks: tuple[int, ...] | None) -> None:
    targets = TARGETS[task]
    learner = RidgeLearner(POOL[:60], targets[:60], num_classes=3, task=task, blocks=blocks, keep_rows=False)
    check_same(learner.head, refitted(list(range(60)), task, learner))
    before = learner.state_dict()
    learner.update(POOL[60:200], targets[60:200])
    learner.forget(POOL[20:90], targets[20:90])
    rows = [*range(20), *range(90, 200)]
    assert learner.num_rows == 130
    learner.refit(0.3)
    columns = torch.nn.functional.one_hot(targets).double() if task == "multiclass" else targets.double()
    # What regression on the columns gives, which the first calibration makes logits of.
    options: dict[str, Any] = {"num_classes": 3, "task": "regression", "blocks": blocks, "strengths": [0.3]}
    plain, _ = fit_ridge_head(POOL[rows], columns[rows], **options)
    outputs = plain(POOL).double() * before["factor"] + before["offset"]
    torch.testing.assert_close(learner.head(POOL).double(), outputs, atol=1e-4, rtol=1e-4)


def test_new_classes_join_and_old_ones_leave_without_a_word_until_the_head_is_asked_for() -> None:
    order = TARGETS["multiclass"].argsort(stable=True)
    counts = TARGETS["multiclass"].bincount().tolist()
    first = order[: counts[0] + 20].tolist()
    learner = RidgeLearner(POOL[first], TARGETS["multiclass"][first], num_classes=3, blocks=[4, 26])
    new = order[-20:].tolist()
    learner.update(POOL[new], TARGETS["multiclass"][new])
    check_same(learner.head, refitted(first + new, "multiclass", learner))
    learner.forget(torch.arange(counts[0], counts[0] + 40))
    with pytest.raises(CalibrationError, match=f"at least two classes; all {counts[0]} targets are 0"):
        _ = learner.head
    learner.update(POOL[new], TARGETS["multiclass"][new])
    check_same(learner.head, refitted(first[: counts[0]] + new, "multiclass", learner))


def test_the_strength_stays_until_it_is_chosen_anew_or_set() -> None:
    learner = RidgeLearner(POOL[:12], TARGETS["regression"][:12], num_classes=3, task="regression", strength=50.0)
    learner.update(POOL[12:], TARGETS["regression"][12:])
    assert learner.strength == 50.0
    first = learner.head
    assert learner.head is first
    expected, fit = fit_ridge_head(POOL, TARGETS["regression"], num_classes=3, task="regression")
    assert learner.refit() == fit
    assert learner.strength == fit.strength != 50.0
    check_same(learner.head, expected)
    learner.refit(50.0)
    check_same(learner.head, first)


@pytest.mark.parametrize("keep_rows", [True, False])
@pytest.mark.parametrize("count", [12, 80])
@pytest.mark.parametrize("task", TASKS)
def test_a_state_in_safetensors_brings_back_all_of_it(task: Task, count: int, keep_rows: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_classes": 3, "task": task, "blocks": [4, 26], "keep_rows": keep_rows}
    learner = RidgeLearner(POOL[:count], TARGETS[task][:count], **options)
    learner.update(POOL[count : count + 9], TARGETS[task][count : count + 9])
    save_file(learner.state_dict(), tmp_path / "learner.safetensors")
    again = RidgeLearner.from_state_dict(load_file(tmp_path / "learner.safetensors"))
    check_same(again.head, learner.head)
    for one in (learner, again):
        one.update(POOL[200:300], TARGETS[task][200:300])
    assert again.num_rows == learner.num_rows == count + 109
    assert (again.task, again.blocks, again.strength) == (learner.task, learner.blocks, learner.strength)
    check_same(again.head, learner.head)
    assert (("features" in again.state_dict()), "xx" in again.state_dict()) == (keep_rows, True)
    with pytest.raises(StitchError, match="not all of a RidgeLearner's state; found"):
        RidgeLearner.from_state_dict({"strength": torch.tensor(1.0)})


def test_heads_can_be_trained_on_when_rows_came_in_inference_mode() -> None:
    with torch.inference_mode():
        learner = RidgeLearner(POOL[:60].clone(), TARGETS["multiclass"][:60].clone(), num_classes=3, blocks=[30])
        learner.update(POOL[60:70].clone(), TARGETS["multiclass"][60:70].clone())
    learner.update(POOL[70:80], TARGETS["multiclass"][70:80])
    learner.head(POOL).sum().backward()
    assert learner.head.weight.grad is not None


def test_what_cannot_join_or_leave_is_named_and_changes_nothing() -> None:
    labels = TARGETS["multiclass"]
    kept = RidgeLearner(POOL[:40], labels[:40], num_classes=3)
    summed = RidgeLearner(POOL[:40], labels[:40], num_classes=3, keep_rows=False)
    before = [learner.state_dict() for learner in (kept, summed)]
    bad: list[tuple[Tensor, Tensor, str]] = [
        (POOL[:3, :9], labels[:3], "Rows must have 30 features, as the first; found 9"),
        (POOL[:3], labels[:2], "features and targets must have the same number of rows"),
        (POOL[:3] / 0, labels[:3], "features has NaN or infinite values in 3 of its 3 rows"),
        (POOL[:3], labels[:3] + 3, "Targets must lie from 0 to 2"),
    ]
    for learner in (kept, summed):
        for features, targets, words in bad:
            with pytest.raises(CalibrationError, match=words):
                learner.update(features, targets)
        with pytest.raises(CalibrationError, match="at least 2 rows; 1 of 40 would be left"):
            learner.forget(torch.arange(39))
    for places, words in (([0, 0], "Places must differ"), ([40], "from 0 to 39; found"), ([-1], "from 0 to 39")):
        with pytest.raises(StitchError, match=words):
            kept.forget(torch.tensor(places))
    with pytest.raises(StitchError, match=r"by their places, integers.*found torch.float32"):
        kept.forget(POOL[:2])
    with pytest.raises(StitchError, match="by their places alone; found targets as well"):
        kept.forget(torch.tensor([1]), labels[:1])
    with pytest.raises(StitchError, match="forget them by their features and targets"):
        summed.forget(torch.tensor([1]))
    with pytest.raises(StitchError, match="refit needs a strength, a positive finite number; found None"):
        summed.refit()
    for learner, state in zip((kept, summed), before, strict=True):
        torch.testing.assert_close(learner.state_dict(), state, rtol=0, atol=0)
