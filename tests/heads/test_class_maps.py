from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from doubles.tensors import normal

from lightning_stitch.errors import StitchError
from lightning_stitch.heads import class_maps
from lightning_stitch.heads.class_maps import ClassMapHead, class_map_from_names, parse_class_map

LOGITS = 3 * normal(7, 12)
BOATS = ["tabby, tabby cat", "catamaran", "Persian cat", "cat bear, panda", "trimaran", "crane", "crane, derrick"]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(class_maps) == (0, 2)


def test_probabilities_are_the_sums_of_the_mapped_ones_among_those_that_are_mapped() -> None:
    head = ClassMapHead([[0, 5], [11], [2, 3, 4]], 12)
    p = LOGITS.softmax(1)
    sums = torch.stack([p[:, [0, 5]].sum(1), p[:, 11], p[:, [2, 3, 4]].sum(1)], 1)
    torch.testing.assert_close(head(LOGITS).exp(), sums)
    torch.testing.assert_close(head(LOGITS).softmax(1), sums / sums.sum(1, keepdim=True))


def test_all_that_nobody_maps_can_be_a_class_of_its_own_the_last() -> None:
    head = ClassMapHead([[0, 5], [11]], 12, other=True)
    p = LOGITS.softmax(1)
    sums = torch.stack([p[:, [0, 5]].sum(1), p[:, 11], 1 - p[:, [0, 5, 11]].sum(1)], 1)
    torch.testing.assert_close(head(LOGITS).softmax(1), sums)
    with pytest.raises(StitchError, match="All 2 source classes are mapped, so none is left for another class"):
        ClassMapHead([[0], [1]], 2, other=True)


def test_classes_that_are_nearly_impossible_keep_finite_log_probabilities_and_gradients() -> None:
    logits = torch.tensor([[1000.0, 0.0, 1.0, 2.0]], requires_grad=True)
    outputs = ClassMapHead([[1, 2], [3]], 4)(logits)
    expected = torch.tensor([[torch.logaddexp(torch.tensor(0.0), torch.tensor(1.0)), 2.0]]) - 1000
    torch.testing.assert_close(outputs, expected)
    outputs[0, 0].backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 1:3], torch.tensor([0.0, 1.0]).softmax(0))


def test_the_map_is_in_the_state_dict_and_nothing_is_to_be_trained() -> None:
    head = ClassMapHead([[0, 5], [11]], 12)
    assert head.state_dict()["assignment"].tolist() == [0, 2, 2, 2, 2, 0, 2, 2, 2, 2, 2, 1]
    assert not list(head.parameters())
    assert repr(head) == "ClassMapHead(num_source_classes=12, num_classes=2)"


def test_a_map_is_written_as_numbers_ranges_and_lists_of_them() -> None:
    found = parse_class_map({"dog": "151-268", "cat": [281, "282 - 284", "285", 281], "cup": 968})
    assert found == {"dog": list(range(151, 269)), "cat": [281, 282, 283, 284, 285], "cup": [968]}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({}, "needs at least one class; this one is empty"),
        ({"dog": []}, "'dog' has no source classes"),
        ({"dog": "200-151"}, "'dog' has '200-151', which runs backwards or too far: from 200 to 151"),
        ({"dog": ["Chihuahua"]}, "For names of classes use class_map_from_names, or say names: imagenet-1k"),
        ({"dog": [151.5]}, "'dog' has 151.5"),
        ({"dog": [-1]}, "source class -1; those there are go from 0"),
        ({"dog": "151-268", "pug": [254]}, "source class 254 is mapped to both 'dog' and 'pug'"),
        (["dog"], r"A class map is \{'dog': '151-268', ...\}; found \['dog'\]"),
    ],
)
def test_a_map_that_is_none_is_refused(classes: Any, words: str) -> None:
    with pytest.raises(StitchError, match=words):
        parse_class_map(classes)


def test_source_classes_that_do_not_exist_are_named() -> None:
    with pytest.raises(StitchError, match="has the source class 12; those there are go from 0 to 11"):
        ClassMapHead([[0], [12]], 12)


def test_a_name_is_the_whole_of_one_of_a_source_classes_names() -> None:
    assert class_map_from_names({"cat": ["tabby", "PERSIAN  cat"], "boat": "catamaran"}, BOATS) == {
        "cat": [0, 2],
        "boat": [1],
    }


def test_a_stretch_of_the_list_is_named_by_its_ends() -> None:
    dogs = {"dog": "Chihuahua .. Mexican hairless", "cat": ["tabby .. tiger cat", "Persian cat"]}
    assert class_map_from_names(dogs) == {"dog": list(range(151, 269)), "cat": [281, 282, 283]}
    assert class_map_from_names({"fox": ["Vulpes fulva"]}, "imagenet-12k") == {"fox": [1600]}


def test_a_number_says_which_of_several_source_classes_of_one_name_is_meant() -> None:
    assert class_map_from_names({"bird": 5, "boat": ["trimaran", 1]}, BOATS) == {"bird": [5], "boat": [1, 4]}


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        ({"cat": "cat"}, {}, r"No source class is named 'cat'. The nearest are 'tabby cat', 'Persian cat'"),
        ({"cat": "persian cut"}, {}, r"No source class is named 'persian cut'. The nearest are 'Persian cat'"),
        ({"bird": "crane"}, {}, r"'crane' names several source classes: 5 \(crane\); 6 \(crane, derrick\)"),
        ({"bird": 7}, {}, "the source class 7; those there are go from 0 to 6"),
        ({"cat": "trimaran .. tabby"}, {}, "runs backwards or too far: from 4 to 0"),
        ({"cat": "tabby", "pet": [0, 1]}, {}, "source class 0 is mapped to both 'cat' and 'pet'"),
        ({"cat": "tabby"}, {"names": "imagenet"}, "Unknown names 'imagenet': say 'imagenet-1k'"),
        ({"cat": []}, {}, "'cat' has no source classes"),
    ],
)
def test_names_that_say_nothing_or_too_much_are_refused(classes: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        class_map_from_names(classes, **{"names": BOATS, **options})
