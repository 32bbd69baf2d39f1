from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Pairs, drawn, loader_of, numbered, write_folder
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.image_files import ImageFileSet
from lightning_stitch.data.images import Decoder
from lightning_stitch.errors import CalibrationError

COLOUR = (40, 80, 120)


class Failing(Dataset):
    """Grey images of which one cannot be decoded."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.labels = error, at, [0, 1] * 20

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.at:
            raise self.error
        return torch.full((3, 4, 4), index / 100), self.labels[index]


ERRORS = [
    Image.DecompressionBombError("Image size exceeds limit"),
    ValueError("bad"),
    SyntaxError("broken PNG file"),
    struct.error("unpack requires 4 bytes"),
    OSError("image file is truncated"),
    EOFError(),
    KeyError("label"),
    AttributeError("no such thing"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [0, 17])
def test_any_error_of_a_decoder_names_the_image(error: Exception, at: int) -> None:
    kind = type(error).__name__ if not isinstance(error, OSError) else "truncated"
    with pytest.raises(CalibrationError, match=rf"Image {at} of train: .*{kind}") as caught:
        CalibrationDataModule(Failing(error, at), calibration_samples=4).setup()
    assert caught.value.__cause__ is error
    joined = ConcatDataset([numbered(10, first=500), Subset(Failing(error, at), range(40))])
    with pytest.raises(CalibrationError, match=rf"Image {10 + at} of val: .*{kind}"):
        CalibrationDataModule(numbered(40), joined, image_size=4, calibration_samples=4).setup()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_breaks_behind_a_concat_dataset_is_named(tmp_path: Path, num_workers: int) -> None:
    folders = [ImageFolder(write_folder(tmp_path / name, {"cat": 9, "dog": 9})) for name in ("one", "two")]
    module = CalibrationDataModule(
        ConcatDataset([folders[0], Subset(folders[1], range(17, -1, -1))]),
        calibration_samples=4,
        num_workers=num_workers,
    )
    module.setup()
    for path in (tmp_path / "two").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CalibrationError, match=r"Image \d+ of train \(.*/two/.*\.png\)"):
        list(loader_of(module, "train"))


def test_a_decompression_bomb_is_named_in_training_and_in_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9}, size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    words = r"cat/0\.png.*DecompressionBombError|cat/0\.png.*exceeds limit"
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(image_folder=str(tmp_path), calibration_samples=4).setup()
    with pytest.raises(CalibrationError, match=words):
        ImageFileSet([tmp_path / "cat" / "0.png"], (3, 8, 8))[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "RGBX", "PA", "I;16"])
def test_pil_images_of_any_mode_become_what_their_file_would(tmp_path: Path, mode: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey.astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(grey)
    if mode in ("RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "P", "PA"):
        image = Image.merge("RGB", [image, image.rotate(90), image.rotate(180)])
    image = image if image.mode == mode else image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)
    decoded = Decoder(3)(image)
    expected = image if mode in ("L", "I;16") else image.convert("RGB")
    top = 65535 if mode == "I;16" else 255
    values = torch.from_numpy(np.array(expected, dtype=np.float32) / top)
    values = values.permute(2, 0, 1) if values.ndim == 3 else values.expand(3, -1, -1)
    torch.testing.assert_close(decoded, values)
    if mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16"):
        image.save(tmp_path / "1.png")
        assert torch.equal(ImageFileSet([tmp_path / "1.png"], (3, 16, 16))[0][0], decoded)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_images_without_a_known_white_are_refused_with_the_mend(mode: str) -> None:
    pool = Pairs([Image.new(mode, (4, 4), number) for number in range(20)], [0, 1] * 10)
    with pytest.raises(CalibrationError, match=rf"Image 0 of train: .*\(mode '{mode}'\).*\.convert\('L'\)"):
        CalibrationDataModule(pool, calibration_samples=4).setup()


def test_four_channels_stay_where_four_are_asked_for() -> None:
    image = Image.new("RGBA", (4, 4), (*COLOUR, 7))
    expected = torch.tensor([*COLOUR, 7]).view(4, 1, 1).expand(4, 4, 4) / 255
    torch.testing.assert_close(Decoder(4)(image), expected)
    with pytest.raises(CalibrationError, match=r"the image has 3 channels .*num_channels is 4"):
        Decoder(4)(image.convert("RGB"))


def test_a_dataset_of_ones_own_that_gives_pil_images_is_upright_too(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9}, size=(6, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in tmp_path.rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    module = CalibrationDataModule(ImageFolder(str(tmp_path)), calibration_samples=4)
    assert module.image_shape == (3, 6, 10)
    index = int(module.head_dataloader().dataset.indices[0])
    file = ImageFolder(str(tmp_path)).samples[index][0]
    assert torch.equal(module.head_dataloader().dataset[0][0], ImageFileSet([Path(file)], (3, 6, 10))[0][0])
    pixels = functional.to_tensor(Image.open(file).convert("RGB"))
    assert torch.equal(module.head_dataloader().dataset[0][0], pixels.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": torch.zeros(3, 4, 4), "label": 1}, r"found a dict with the keys \['image', 'label'\]. Wrap"),
        (torch.zeros(3, 4, 4), r"a pair \(image, label\); found a Tensor.*task='none'"),
        ((torch.zeros(3, 4, 4),), "found a tuple"),
    ],
)
def test_items_that_are_no_pairs_are_refused_with_the_mend(item: Any, words: str) -> None:
    class Bare(Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            return item

    with pytest.raises(CalibrationError, match=words):
        drawn(CalibrationDataModule(Bare(), calibration_samples=4), "train")
