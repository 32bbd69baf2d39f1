from __future__ import annotations

from typing import Any

import pytest

import lightning_stitch as ls
from lightning_stitch.settings import image_shape_of

SOURCE = {"spec": "test_resnet", "pretrained": False}


@pytest.mark.parametrize("size", [48, (48, 48), [3, 48, 48]])
def test_a_size_is_a_number_two_or_three_wherever_one_is_asked_for(size: Any) -> None:
    assert image_shape_of(size) == (3, 48, 48)
    pool = ls.Pool(ls.load_sources([SOURCE]), size)
    assert pool.image_shape == (3, 48, 48)
    assert ls.preflight([SOURCE], image_shape=size).image_shape == (3, 48, 48)


@pytest.mark.parametrize("size", [0, "96", (3, 96, 96, 1), (96.0, 96), None, True, (3, -1, 4)])
def test_what_is_no_size_is_told_in_a_sentence(size: Any) -> None:
    with pytest.raises(ls.StitchError, match="An image's size is 96"):
        image_shape_of(size)
