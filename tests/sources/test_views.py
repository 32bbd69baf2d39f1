from __future__ import annotations

import pytest
import torch
from doubles.tensors import noise
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.views import Preprocess, view_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 3, 17, 17)])
def test_images_are_normalised_and_keep_their_size(shape: tuple[int, int, int, int]) -> None:
    images = noise(*shape)
    assert torch.allclose(Preprocess(Preprocessing((3, 224, 224), MEAN, STD))(images), T.normalize(images, MEAN, STD))


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("bilinear", InterpolationMode.BILINEAR),
        ("bicubic", InterpolationMode.BICUBIC),
        ("nearest", InterpolationMode.NEAREST),
        ("lanczos", InterpolationMode.BICUBIC),
        ("random", InterpolationMode.BICUBIC),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3, 48, 40), (2, 3, 10, 12)], ids=["shrink", "grow"])
def test_a_source_of_fixed_size_gets_its_size_in_its_interpolation(
    word: str, mode: InterpolationMode, shape: tuple[int, int, int, int]
) -> None:
    images = noise(*shape)
    resized = T.resize(images, [24, 16], mode, antialias=True)
    preprocess = Preprocess(Preprocessing((3, 24, 16), MEAN, STD, word, fixed_size=True))
    assert torch.allclose(preprocess(images), T.normalize(resized, MEAN, STD), atol=1e-5)


def test_images_that_have_the_fixed_size_are_not_resampled() -> None:
    images = noise(2, 3, 24, 16)
    preprocess = Preprocess(Preprocessing((3, 24, 16), (0.0,) * 3, (1.0,) * 3, "bicubic", fixed_size=True))
    assert torch.equal(preprocess(images), images)


def test_any_number_of_channels() -> None:
    images = noise(2, 5, 8, 8)
    preprocess = Preprocess(Preprocessing((5, 8, 8), (0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 2.0, 3.0, 4.0, 5.0)))
    by_hand = [(images[:, channel] - (channel + 1) / 10) / (channel + 1) for channel in range(5)]
    assert torch.allclose(preprocess(images), torch.stack(by_hand, 1))


def test_mean_and_std_move_with_the_module_but_stay_out_of_the_state_dict() -> None:
    preprocess = Preprocess(Preprocessing((3, 8, 8), MEAN, STD)).double()
    assert preprocess(noise(1, 3, 8, 8).double()).dtype == torch.float64
    assert preprocess.state_dict() == {}


@pytest.mark.parametrize(("fixed", "size"), [(True, (3, 160, 160)), (False, (3, 64, 96))])
def test_the_view_of_a_source_is_its_own_size_only_where_that_is_fixed(fixed: bool, size: tuple[int, int, int]) -> None:
    assert view_size(Preprocessing((3, 160, 160), MEAN, STD, fixed_size=fixed), (3, 64, 96)) == size


def test_a_view_is_float32_whatever_the_default_is() -> None:
    images = noise(2, 3, 16, 16)
    expected = Preprocess(Preprocessing((3, 8, 8), (0.4,) * 3, (0.3,) * 3))(images)
    torch.set_default_dtype(torch.float64)
    try:
        view = Preprocess(Preprocessing((3, 8, 8), (0.4,) * 3, (0.3,) * 3))(images)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(view, expected, rtol=0, atol=0)
