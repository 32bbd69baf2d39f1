from __future__ import annotations

import doctest
import json
from typing import Any

import pytest
import torch
from doubles.tensors import normal
from torch import Tensor, nn

from lightning_stitch import fit_head
from lightning_stitch.errors import StitchError
from lightning_stitch.heads import head_settings
from lightning_stitch.heads.class_maps import ClassMapHead
from lightning_stitch.heads.head_settings import HEADS, HeadSettings
from lightning_stitch.heads.neighbours import NearestNeighbourHead, fit_neighbour_head
from lightning_stitch.heads.ridge import RidgeHead, fit_ridge_head

FEATURES = normal(30, 6).float()
CLASSES = torch.arange(30) % 3
LABELS = (normal(30, 4, seed=1) > 0).long()
NUMBERS = normal(30, 2, seed=2).float()
ANIMALS = {"name": "class_map", "classes": {"dog": "0-2", "cat": [4, 5]}}


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(head_settings, extraglobs={"torch": torch}) == (0, 3)


@pytest.mark.parametrize(
    ("head", "task", "targets", "kind"),
    [
        ("ridge", "multiclass", CLASSES, RidgeHead),
        ({"name": "ridge", "strengths": [0.5]}, "multilabel", LABELS, RidgeHead),
        ("ridge", "regression", NUMBERS, RidgeHead),
        ("knn", "multiclass", CLASSES, NearestNeighbourHead),
        ({"name": "knn", "metric": "euclidean", "num_neighbours": 4}, "multilabel", LABELS, NearestNeighbourHead),
        ({"name": "knn", "temperature": 0.1}, "regression", NUMBERS, NearestNeighbourHead),
        (ANIMALS, "multiclass", None, ClassMapHead),
        ({**ANIMALS, "other": True}, "multiclass", None, ClassMapHead),
        ("none", "multiclass", None, nn.Identity),
    ],
)
def test_every_head_is_rebuilt_from_plain_settings_and_its_state_dict(
    head: Any, task: str, targets: Tensor | None, kind: type[nn.Module]
) -> None:
    count = None if targets is None else 3 if targets.ndim == 1 else targets.shape[1]
    settings = HeadSettings.of(head, task=task, num_classes=count)
    fitted, _ = settings.fit(FEATURES, targets)
    assert type(fitted) is kind
    plain = json.loads(json.dumps(settings.plain))
    again = HeadSettings.of(plain, task=task, num_classes=settings.num_classes or None)
    assert again == settings
    rebuilt = again.empty(6)
    rebuilt.load_state_dict(fitted.state_dict(), strict=True)
    assert torch.equal(rebuilt(FEATURES), fitted(FEATURES))
    assert fitted(FEATURES).shape == (30, settings.num_classes or 6)
    assert torch.equal(fit_head(FEATURES, targets, head)(FEATURES), fitted(FEATURES))


def test_options_reach_the_fit() -> None:
    ridge, _ = fit_ridge_head(FEATURES, CLASSES, num_classes=3, strengths=[7.0])
    knn = fit_neighbour_head(FEATURES, CLASSES, num_classes=3, num_neighbours=4, temperature=0.3, metric="euclidean")
    for expected, head in (
        (ridge, {"name": "ridge", "strengths": [7.0]}),
        (knn, {"name": "knn", "num_neighbours": 4, "temperature": 0.3, "metric": "euclidean"}),
    ):
        assert torch.equal(fit_head(FEATURES, CLASSES, head)(FEATURES), expected(FEATURES))


def test_options_that_are_none_are_as_if_they_were_not_given() -> None:
    settings = HeadSettings.of({"name": "knn", "num_neighbours": None}, num_classes=3)
    assert settings == HeadSettings.of("knn", num_classes=3)
    assert settings.plain == "knn"


def test_a_class_map_knows_its_classes_and_ends_at_the_output_without_labels() -> None:
    settings = HeadSettings.of({**ANIMALS, "other": "thing"}, num_classes=None)
    assert (settings.class_names, settings.num_classes) == (("dog", "cat", "thing"), 3)
    assert (settings.until, settings.needs_targets) == ("output", False)
    p = FEATURES.softmax(1)
    torch.testing.assert_close(
        settings.fit(FEATURES, None)[0](FEATURES).softmax(1),
        torch.stack([p[:, :3].sum(1), p[:, 4:].sum(1), p[:, 3]], 1),
    )
    for name in set(HEADS) - {"class_map"}:
        other = HeadSettings.of(name, num_classes=2)
        assert (other.until, other.needs_targets) == ("features", name != "none")


def test_names_in_a_class_map_are_resolved_once_and_kept_as_numbers() -> None:
    head = {"name": "class_map", "names": "imagenet-1k", "classes": {"cat": "tabby .. Egyptian cat", "fox": "red fox"}}
    settings = HeadSettings.of(head, num_classes=2)
    assert settings.plain == {"name": "class_map", "classes": {"cat": [281, 282, 283, 284, 285], "fox": [277]}}


@pytest.mark.parametrize(
    ("head", "task", "count", "words"),
    [
        ("svm", "multiclass", 3, r"head must be one of \('ridge', 'knn', .*found 'svm'"),
        ({"k": 3}, "multiclass", 3, r"a mapping with such a 'name'; found \{'k': 3\}"),
        ({"name": "knn", "k": 3}, "multiclass", 3, r"'knn' has no options \['k'\]; it takes \['num_neighbours', "),
        ({"name": "knn", "metric": "l1"}, "multiclass", 3, "found 'l1'"),
        ("ridge", "classification", 3, r"task must be one of .*found 'classification'"),
        ("ridge", "multiclass", None, "needs num_classes=, the number of classes"),
        ("knn", "multilabel", None, "needs num_classes=, the number of labels"),
        ("ridge", "multiclass", 1, "num_classes must be an integer, at least 2; found 1"),
        ("ridge", "regression", 0, "num_classes must be an integer, at least 1; found 0"),
        (ANIMALS, "regression", 1, "tells classes apart; for task='regression' use 'ridge' or 'knn'"),
        (ANIMALS, "multilabel", 2, "for task='multilabel' use 'ridge' or 'knn'"),
        ("class_map", "multiclass", 2, "needs its classes: head="),
        (ANIMALS, "multiclass", 3, r"num_classes=3, but the class map has 2: \['dog', 'cat'\]"),
        ({**ANIMALS, "other": "dog"}, "multiclass", None, "are both named 'dog'"),
        ({"name": "class_map", "classes": {"dog": 1}}, "multiclass", None, "two classes, or one and other=true"),
    ],
)
def test_heads_that_make_no_sense_are_refused(head: Any, task: str, count: int | None, words: str) -> None:
    with pytest.raises(StitchError, match=words):
        HeadSettings.of(head, task=task, num_classes=count)


def test_a_regressions_default_is_one_number() -> None:
    assert HeadSettings.of("knn", task="regression", num_classes=None).num_classes == 1


def test_a_head_that_learns_from_labels_says_that_there_are_none() -> None:
    with pytest.raises(StitchError, match="head='knn' is fitted on labelled images; these have no labels"):
        fit_head(FEATURES, None, "knn", num_classes=3)


@pytest.mark.parametrize("head", ["ridge", "knn", {"name": "knn", "metric": "euclidean"}, ANIMALS])
def test_heads_are_exported_for_any_number_of_images(head: Any) -> None:
    fitted = fit_head(FEATURES, CLASSES, head).eval()
    batch = torch.export.Dim("images", min=2)
    exported = torch.export.export(fitted, (FEATURES[:4],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(FEATURES[:9]), fitted(FEATURES[:9]))
