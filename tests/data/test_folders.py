from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.data import drawn, write_folder
from PIL import Image, features
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.folders import image_suffixes
from lightning_stitch.data.image_files import ImageFileSet, list_images
from lightning_stitch.data.images import open_image
from lightning_stitch.errors import CalibrationError


def folder_of(root: Path, **options: int) -> CalibrationDataModule:
    return CalibrationDataModule(image_folder=str(root), **{"calibration_samples": 4, "image_size": 8, **options})


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", ".thumbnails"])
def test_hidden_and_system_folders_are_no_classes_and_said_to_be_left_out(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9, name: 3, f"cat/{name}": 2})
    for path in ("Thumbs.db", "cat/.DS_Store", "dog/desktop.ini"):
        (tmp_path / path).write_bytes(b"no image")
    module = folder_of(tmp_path)
    with pytest.warns(UserWarning, match=rf"5 files and folders of .* left out.*cat/{name}/0\.png") as said:
        module.setup()
    assert len(said) == 1
    assert (module.class_names, sum(module.summary.values())) == (["cat", "dog"], 18)
    assert len(list_images([tmp_path])) == 18


def test_files_that_are_no_images_are_counted_and_named_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9})
    for number in range(7):
        (tmp_path / "cat" / f"{number}.txt").write_text("a cat")
    (tmp_path / "labels.csv").write_text("0,cat")
    with pytest.warns(UserWarning, match=r"8 files and folders .*0\.txt, .*4\.txt and 3 more") as said:
        assert folder_of(tmp_path).summary["calibration"] == 4
    assert len(said) == 1


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAINING", "Validation", "TESTING"),
        ("train_set", "dev_set", "test_set"),
        ("training-set", "eval", "testset"),
        ("seg_train/seg_train", "seg_val", "seg_test/seg_test"),
        ("train2017", "val2017", "test2017"),
        ("train_images", "evaluation", "TestImages"),
    ],
)
def test_folders_of_sets_are_known_by_their_usual_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    write_folder(tmp_path / train, {"cat": 8, "dog": 8})
    write_folder(tmp_path / val, {"dog": 3})
    write_folder(tmp_path / test, {"cat": 2, "dog": 1})
    module = folder_of(tmp_path)
    assert module.summary == {"calibration": 4, "train": 12, "selection": 3, "test": 3}
    assert drawn(module, "selection")[1].tolist() == [1, 1, 1]


def test_classes_that_are_called_like_sets_are_classes(tmp_path: Path) -> None:
    module = folder_of(Path(write_folder(tmp_path, {"train": 8, "bus": 8, "test": 8})))
    assert module.class_names == ["bus", "test", "train"]


def test_folders_beside_the_sets_are_said_to_be_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 9, "train/dog": 9, "extra/cat": 2})
    with pytest.warns(UserWarning, match="1 files and folders .*extra/"):
        folder_of(tmp_path).setup()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["2021/cat", "2021/dog", "2022/cat", "2022/dog"], r"one folder too high: all of its 2 .*\['cat', 'dog'\]"),
        (["archive/cat", "archive/dog"], r"one folder too high: all of its 1 folders \['archive'\]"),
        (["archive/train/cat", "archive/train/dog", "archive/test/cat"], r"too high.*'archive'.*\['test', 'train'\]"),
        (["cat/images", "cat/masks", "dog/images", "dog/masks"], r"too high.*\['images', 'masks'\]"),
        (["train/a/cat", "train/a/dog", "train/b/cat", "train/b/dog", "val/cat"], "train seems one folder too high"),
        (["train/cat", "train/dog", "Training/cat"], "are both taken for train"),
    ],
)
def test_a_folder_that_is_not_that_of_the_classes_is_refused(tmp_path: Path, folders: list[str], words: str) -> None:
    write_folder(tmp_path, dict.fromkeys(folders, 9))
    with pytest.raises(CalibrationError, match=words):
        folder_of(tmp_path).setup()


def test_folders_inside_of_classes_belong_to_these(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/persian": 5, "cat/siamese": 5, "dog/pug": 5, "dog/images": 5})
    assert folder_of(tmp_path).class_names == ["cat", "dog"]
    write_folder(tmp_path / "tiny", {"n1/images": 9, "n2/images": 9})  # as Tiny ImageNet has them
    assert folder_of(tmp_path / "tiny").class_names == ["n1", "n2"]


SUFFIXES = [".jfif", ".jpe", ".JPG", ".gif", ".tga", ".jp2", ".ico", ".pnm", ".webp", ".avif"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_that_pillow_reads_is_read_in_training_and_prediction_alike(tmp_path: Path, suffix: str) -> None:
    if suffix in (".avif", ".jp2", ".webp"):
        assert features.check({".avif": "avif", ".jp2": "jpg_2000", ".webp": "webp"}[suffix])
    noise = np.random.default_rng(0).integers(0, 256, (18, 16, 16, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / ("cat", "dog")[number % 2] / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    module = folder_of(tmp_path, image_size=16)
    assert sum(module.summary.values()) == 18
    files = list_images([tmp_path])
    predicted = {image.numpy().tobytes() for image, _ in ImageFileSet(files, module.image_shape)}
    loaders = [module.head_dataloader(), module.calibration_dataloader()]
    trained = {image.numpy().tobytes() for loader in loaders for images, _ in loader for image in images}
    assert len(files) == 18
    assert trained <= predicted


def test_what_pillow_cannot_read_by_itself_is_no_image() -> None:
    assert {".jpg", ".png", ".tiff", ".bmp"} <= set(image_suffixes())
    assert not {".h5", ".mpg", ".eps", ".wmf", ".txt", ".pdf"} & set(image_suffixes())


def write_turned(path: Path, orientation: int) -> torch.Tensor:
    """An image that is white on its left when it is upright, saved as a camera in that orientation would."""
    upright = Image.new("RGB", (16, 16))
    upright.paste((255, 255, 255), (0, 0, 8, 16))
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=exif, quality=100)
    return torch.cat([torch.ones(3, 16, 8), torch.zeros(3, 16, 8)], 2)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_images_are_upright_in_training_and_prediction_alike(tmp_path: Path, orientation: int, suffix: str) -> None:
    write_folder(tmp_path / "train", {"cat": 9, "dog": 9}, size=(16, 16))
    file = tmp_path / "test" / "cat" / f"0{suffix}"
    upright = write_turned(file, orientation)
    trained = folder_of(tmp_path, image_size=16).test_dataloader().dataset[0][0]
    predicted, _ = ImageFileSet([file], (3, 16, 16))[0]
    torch.testing.assert_close(trained, upright, atol=0.02, rtol=0)
    assert torch.equal(trained, predicted)


def test_a_dataset_whose_loader_leaves_images_turned_is_warned_of(tmp_path: Path) -> None:
    for number in range(18):
        path = tmp_path / ("cat", "dog")[number % 2] / f"{number}.png"
        write_turned(path, 6)
        image = Image.open(path)
        image.putpixel((0, 0), (number, 0, 0))
        image.save(path, exif=image.getexif())
    turned = ImageFolder(str(tmp_path), ToTensor())
    with pytest.warns(UserWarning, match=r"train gives images turned as the camera was held.*0\.png.*exif_transpose"):
        CalibrationDataModule(turned, calibration_samples=4).setup()
    upright = ImageFolder(str(tmp_path), ToTensor(), loader=open_image)
    CalibrationDataModule(Subset(upright, range(18)), calibration_samples=4).setup()
    CalibrationDataModule(ImageFolder(str(tmp_path)), calibration_samples=4).setup()
