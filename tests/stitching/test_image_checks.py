from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from doubles.tensors import digits, noise
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_stitch.errors import CalibrationError
from lightning_stitch.stitching.image_checks import Shape, check_images, images_of, is_empty

PHOTOS, DIGITS = noise(6, 3, 12, 12), digits(6, 12)[0]
SHAPE: Shape = (3, None, None)
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))


def resized(images: Tensor, mode: str, size: int, **options: Any) -> Tensor:
    return interpolate(images, (size, size), mode=mode, **options)


SPIKES = torch.zeros(2, 3, 24, 24)
SPIKES[:, :, ::8, ::8] = 1.0


@pytest.mark.parametrize(
    "images",
    [
        PHOTOS,
        PHOTOS.half(),
        PHOTOS.bfloat16(),
        PHOTOS.double(),
        DIGITS,
        torch.zeros(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4),
        PHOTOS / 255,
        torch.full((2, 3, 4, 4), 1e-4),
        torch.full((2, 3, 4, 4), -1e-8),
        PHOTOS * 0.002 - 1e-9,
        *(
            resized(x, "bicubic", n, antialias=a)
            for x in (DIGITS, DIGITS * 0.05)
            for n in (7, 30)
            for a in (True, False)
        ),
        resized(SPIKES, "bicubic", 23) * 0.4,
        resized(SPIKES, "bicubic", 31) * 0.4,
    ],
)
def test_images_in_0_to_1_are_taken_however_dark_and_with_the_overshoot_of_a_resize(images: Tensor) -> None:
    check_images(images, SHAPE)


@pytest.mark.parametrize(
    ("images", "mend"),
    [
        ((PHOTOS * 255).byte(), r"found torch.uint8 of shape \(6, 3, 12, 12\) from 0 to 25\d: divide them, .* / 255"),
        ((PHOTOS * 255).to(torch.int16), "found torch.int16 .* / 255"),
        ((PHOTOS * 65535).to(torch.int32), r"found torch.int32 .* as 65535"),
        ((PHOTOS * 65535).to(torch.uint16), r"found torch.uint16 .* as 65535"),
        (PHOTOS > 0.5, "found torch.bool .* make them float"),
        (PHOTOS * 255, r"found torch.float32 .* from 0.\d+ to 25\d: divide them, .* / 255"),
        (resized(DIGITS * 255, "bicubic", 30), "divide them, .* / 255"),
        (PHOTOS * 65535, "divide them, .* as 65535"),
        ((PHOTOS - IMAGENET[0]) / IMAGENET[1], r"from -2.\d+ to 2.\d+: they look normalised. Leave Normalize out"),
        ((PHOTOS - 0.5) / 0.5, "they look normalised"),
        ((DIGITS - 0.5) / 0.5, "they look normalised"),
        ((DIGITS - 0.13) / 0.31, "they look normalised"),
        (torch.full((2, 3, 4, 4), 2.2), "they look normalised"),
        (PHOTOS * 255 - 120, "they look normalised"),
        # of a normalised set a batch without contrast, and one that happens to keep near [0, 1]
        ((0.47 + 0.06 * PHOTOS - 0.5) / 0.5, r"from -0.06 to 0.06: they look normalised"),
        ((0.49 + 0.1 * (PHOTOS - 0.5) - 0.485) / 0.6, "they look normalised"),
        (PHOTOS * 0.13 - 0.08, "they look normalised"),
        (resized((DIGITS > 0.5).float(), "bicubic", 31), r"a resize overshoots, images.clamp\(0, 1\)"),
        (PHOTOS / 0, "6 of the 6 images have NaN or infinite values"),
        (torch.where(PHOTOS[:, :1] > 0.99, torch.nan, PHOTOS), "of the 6 images have NaN or infinite values"),
        (PHOTOS[0], r"images\[None\] makes a batch"),
        (PHOTOS[:, 0], r"images\[:, None\] gives grey ones"),
        (PHOTOS.permute(0, 2, 3, 1), r"channels first, images.permute\(0, 3, 1, 2\)"),
        (PHOTOS[:, :1], r"repeat the grey channel, images.expand\(-1, 3, -1, -1\)"),
        (torch.cat([PHOTOS, PHOTOS[:, :1]], 1), r"leave the fourth channel .* out, images\[:, :3\]"),
        (PHOTOS[:, :2], "the network was made for 3 channels"),
        (PHOTOS.to(torch.complex64), "found torch.complex64"),
        (list(PHOTOS), r"found list: torch.stack\(list_of_images\)"),
        (PHOTOS.numpy(), "found ndarray"),
    ],
)
def test_what_is_no_image_in_0_to_1_is_named_with_what_to_do(images: Any, mend: str) -> None:
    expected = r"^images must be float in \[0, 1\], \(batch, 3, height, width\), channels first; "
    with pytest.raises(CalibrationError, match=expected + ".*" + mend.removeprefix("found")):
        check_images(images, SHAPE)


def test_a_size_is_expected_only_where_there_is_one() -> None:
    check_images(PHOTOS, (3, 12, 12))
    with pytest.raises(CalibrationError, match=r"\(batch, 3, 16, 12\).*torchvision.transforms.Resize\(\(16, 12\)\)"):
        check_images(PHOTOS, (3, 16, 12))
    with pytest.raises(CalibrationError, match="make them grey"):
        check_images(PHOTOS, (1, None, None))


def test_images_come_alone_or_before_their_targets() -> None:
    labels = torch.arange(6)
    for batch in (PHOTOS, [PHOTOS], (PHOTOS, labels), [PHOTOS, labels, labels]):
        assert images_of(batch) is PHOTOS


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"image": PHOTOS, "label": torch.arange(6)}, r"found a dict with the keys \['image', 'label'\]"),
        ({"pixel_values": PHOTOS}, r"found a dict with the keys \['pixel_values'\]. Let the dataset give pairs"),
        ((tuple(PHOTOS), torch.arange(6)), "found a tuple that begins with a tuple"),
        ([{"image": PHOTOS[0]}], "found a list that begins with a dict"),
        (["a.png"], "found a list that begins with a str"),
        ((np.zeros((2, 3, 4, 4)), torch.arange(2)), "found a tuple that begins with a ndarray"),
        (3, "found a int"),
    ],
)
def test_batches_of_another_form_are_refused_in_words_that_help(batch: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        images_of(batch)


def test_empty_batches_are_known_in_every_form() -> None:
    empty = [None, [], (), PHOTOS[:0], (PHOTOS[:0], torch.arange(0))]
    assert [is_empty(batch) for batch in (*empty, PHOTOS, (PHOTOS, torch.arange(6)))] == [True] * 5 + [False] * 2
