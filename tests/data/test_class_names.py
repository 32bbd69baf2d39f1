from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles.data import Loaders, Pairs, drawn, numbered, write_folder
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_stitch.data.class_names import find_class_names, look_up_classes
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.errors import CalibrationError

FRUIT = ["apple", "bird", "cup"]


class Named(TensorDataset):
    """Numbered images whose dataset knows the names of its classes."""

    def __init__(
        self, count: int, classes: Sequence[str] | None, *, first: int = 0, attribute: str = "classes"
    ) -> None:
        names = classes or ["?"]
        super().__init__(*numbered(count, len(names), first=first).tensors)
        if classes is None:
            return
        values: dict[str, Any] = {
            "classes": list(classes),
            "class_to_idx": {name: number for number, name in enumerate(classes)},
            "features": {"image": None, "label": SimpleNamespace(names=list(classes))},
        }
        setattr(self, attribute, values[attribute])


class Transformed(Dataset):
    """A transform around any dataset, under any attribute's name."""

    def __init__(self, dataset: Dataset, attribute: str = "dataset", shift: int = 0) -> None:
        setattr(self, attribute, dataset)
        self.read, self.length, self.shift = dataset.__getitem__, len(dataset), shift  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.read(index)
        return image + 0.1, (label + self.shift) % 3


class Chosen(Dataset):
    """A Subset of one's own."""

    def __init__(self, data: Dataset, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.indices[index]]


class HuggingFace:
    """As a dataset of Hugging Face looks: dicts as items, and names among its features."""

    def __init__(self, count: int, names: Sequence[str], first: int = 0) -> None:
        self.features = {"image": None, "label": SimpleNamespace(names=list(names))}
        self.column_names = ["image", "label"]
        self.pool = numbered(count, len(names), first=first)

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.pool[index]
        return {"image": image, "label": int(label)}


class Pair(Dataset):
    """Pairs of what a Hugging Face dataset gives."""

    def __init__(self, rows: HuggingFace) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.rows[index]["image"], self.rows[index]["label"]


VAL = ["bird", "cup"]
WRAPPERS = {
    "bare": lambda names, count, first: Named(count, names, first=first),
    "class_to_idx": lambda names, count, first: Named(count, names, first=first, attribute="class_to_idx"),
    "Subset": lambda names, count, first: Subset(Named(count, names, first=first), range(count)),
    "ConcatDataset": lambda names, count, first: ConcatDataset(
        [Named(count // 2, names, first=first), Named(count - count // 2, names, first=first + count // 2)]
    ),
    "wrapper": lambda names, count, first: Transformed(Named(count, names, first=first)),
    "wrapper of a Subset": lambda names, count, first: Transformed(
        Subset(Named(count, names, first=first), range(count)), "subset"
    ),
    "Subset of its own": lambda names, count, first: Chosen(
        Named(count + 9, names, first=first - 9), range(9, count + 9)
    ),
    "Hugging Face": lambda names, count, first: Pair(HuggingFace(count, names, first)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("entrance", ["val", "datamodule"])
def test_labels_of_other_sets_are_those_of_train_by_name(wrap: Any, entrance: str) -> None:
    train, val, test = Named(60, FRUIT), wrap(VAL, 9, 100), wrap(["cup", "apple"], 8, 200)
    if entrance == "val":
        module = CalibrationDataModule(train, val, test, calibration_samples=6)
    else:
        loaders = Loaders(DataLoader(train), DataLoader(val), DataLoader(test))
        module = CalibrationDataModule(datamodule=loaders, calibration_samples=6)
    assert module.class_names == FRUIT
    for part, pool, names in (("selection", val, VAL), ("test", test, ["cup", "apple"])):
        expected = [FRUIT.index(names[int(pool[index][1])]) for index in range(len(pool))]
        assert drawn(module, part)[1].tolist() == expected


@pytest.mark.parametrize("samples", [None, 4])
def test_a_folder_given_as_datasets_is_numbered_by_names(tmp_path: Path, samples: int | None) -> None:
    write_folder(tmp_path / "train", dict.fromkeys(FRUIT, 8))
    write_folder(tmp_path / "val", dict.fromkeys(VAL, 4))
    train, val = ImageFolder(str(tmp_path / "train")), ImageFolder(str(tmp_path / "val"))
    module = CalibrationDataModule(train, val, calibration_samples=4, selection_samples=samples)
    expected = [1] * 4 + [2] * 4 if samples is None else [1, 1, 2, 2]
    assert sorted(drawn(module, "selection")[1].tolist()) == expected


def test_parts_of_train_that_number_classes_differently_are_joined_by_name() -> None:
    train = ConcatDataset([Named(30, ["bird", "apple"]), Named(30, ["cup", "bird"], first=30), numbered(0)])
    module = CalibrationDataModule(train, Named(6, FRUIT, first=100), calibration_samples=6)
    assert module.class_names == ["bird", "apple", "cup"]
    indices, labels = drawn(module, "train")
    names = [["bird", "apple"][i % 2] if i < 30 else ["cup", "bird"][(i - 30) % 2] for i in indices]
    assert [module.class_names[label] for label in labels] == names
    assert drawn(module, "selection")[1].tolist() == [1, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_class_that_train_does_not_have_is_named(wrap: Any) -> None:
    module = CalibrationDataModule(Named(60, FRUIT), test=wrap(["bird", "fox"], 8, 200), calibration_samples=6)
    with pytest.raises(
        CalibrationError, match=r"Image \d of test.*'fox', which train does not have: that has \['apple'"
    ):
        module.setup()


def test_a_class_without_images_does_no_harm() -> None:
    test = Subset(Named(8, ["bird", "fox"], first=200), [0, 2, 4])
    assert (
        drawn(CalibrationDataModule(Named(60, FRUIT), test=test, calibration_samples=6), "test")[1].tolist() == [1] * 3
    )


@pytest.mark.parametrize("names", [(None, None), (FRUIT, None), (None, FRUIT)])
def test_labels_are_left_as_they_are_where_a_side_knows_no_names(names: Any) -> None:
    train, test = numbered(60, 3), numbered(9, 3, first=200)
    for pool, classes in zip((train, test), names, strict=True):
        if classes:
            pool.classes = classes
    module = CalibrationDataModule(train, test=test, calibration_samples=6)
    assert (module.class_names, drawn(module, "test")[1].tolist()) == (names[0], [0, 1, 2] * 3)


def test_names_as_labels_are_sorted_and_numbered_alike_everywhere() -> None:
    def named(names: list[Any], first: int) -> Pairs:
        return Pairs(list(numbered(len(names), first=first).tensors[0]), names)

    train = named(["cup", "apple", "bird"] * 20, 0)
    test = named(["cup", np.str_("bird")] * 3, 100)
    module = CalibrationDataModule(train, test=test, calibration_samples=6)
    assert module.class_names == FRUIT
    assert drawn(module, "test")[1].tolist() == [2, 1] * 3
    mixed = CalibrationDataModule(train, Named(6, ["cup", "apple"], first=100), calibration_samples=6)
    assert drawn(mixed, "selection")[1].tolist() == [2, 0] * 3
    with pytest.raises(CalibrationError, match="Image 2 of test: its class is 'fox'"):
        CalibrationDataModule(train, test=named(["cup", "cup", "fox"], 100), calibration_samples=6).setup()
    with pytest.raises(CalibrationError, match="label is the name 'cup', but the labels of train are numbers"):
        CalibrationDataModule(numbered(60), test=named(["cup"], 100), calibration_samples=6).setup()


def test_a_wrapper_that_changes_labels_has_no_names() -> None:
    assert find_class_names(Transformed(Named(30, FRUIT))) == FRUIT
    assert find_class_names(Transformed(Named(30, FRUIT), shift=1)) is None
    mixed = Transformed(ConcatDataset([Named(30, FRUIT), Named(30, VAL)]))
    with pytest.raises(CalibrationError, match="Transformed wraps datasets that number their classes differently"):
        find_class_names(mixed)


def test_hidden_folders_among_the_classes_of_a_dataset_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9, ".ipynb_checkpoints": 2})
    with pytest.raises(
        CalibrationError, match=r"hidden or system folders among its classes: \['\.ipynb_checkpoints'\]"
    ):
        CalibrationDataModule(ImageFolder(str(tmp_path)), calibration_samples=4).setup()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_looks_classes_up_by_name(wrap: Any) -> None:
    assert look_up_classes(wrap(VAL, 9, 100), FRUIT).tolist() == [1, 2]  # type: ignore[union-attr]
    assert look_up_classes(wrap(FRUIT, 9, 100), FRUIT) is None
    assert look_up_classes(wrap(VAL, 9, 100), None) is None
    assert look_up_classes(numbered(9), FRUIT) is None
    with pytest.raises(
        CalibrationError, match=r"has the classes \['fox'\], which the model does not know; it knows \['ap"
    ):
        look_up_classes(wrap(["bird", "fox"], 9, 100), FRUIT)


def test_parts_that_a_model_would_have_to_number_differently_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"parts number their classes differently.*one by one"):
        look_up_classes(ConcatDataset([Named(6, VAL), Named(6, ["apple"])]), FRUIT)
    unseen = Subset(Named(8, ["bird", "fox"]), [0, 2])
    assert look_up_classes(unseen, FRUIT).tolist() == [1, -1]  # type: ignore[union-attr]
    module = CalibrationDataModule(Named(60, VAL), calibration_samples=6)
    assert look_up_classes(module.test_dataloader().dataset, FRUIT).tolist() == [1, 2]  # type: ignore[union-attr]
