"""A finished model on data that number its classes otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.predictions import NAMES, SIZE, classifier, quiet_trainer, small_source
from doubles.tensors import digits
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_stitch import CalibrationDataModule, StitchedClassifier
from lightning_stitch.errors import CalibrationError

# A class without images has no figures of its own.
pytestmark = pytest.mark.filterwarnings("ignore:No positive samples in targets")

TWO = [NAMES[2], NAMES[1]]


@pytest.fixture
def model() -> StitchedClassifier:
    return classifier(small_source(3))


def renumbered(model: StitchedClassifier, classes: list[str]) -> TensorDataset:
    """Images that the model takes for some classes, numbered by these: its accuracy on them is 1."""
    images, _ = digits(150, SIZE, classes=3)
    with torch.no_grad():
        found = [NAMES[label] for label in model.eval()(images).argmax(1).tolist()]
    kept = [index for index, name in enumerate(found) if name in classes]
    dataset = TensorDataset(images[kept], torch.tensor([classes.index(found[index]) for index in kept]))
    dataset.classes = classes  # type: ignore[attr-defined]
    assert set(dataset.tensors[1].tolist()) == set(range(len(classes)))
    return dataset


@pytest.mark.parametrize("classes", [NAMES, NAMES[::-1], TWO])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(3, 20)), lambda d: ConcatDataset([d, d])])
def test_a_perfect_model_is_perfect_on_data_that_number_its_classes_otherwise(
    tmp_path: Path, model: StitchedClassifier, classes: list[str], wrap: Any
) -> None:
    loader = DataLoader(wrap(renumbered(model, classes)), batch_size=16)
    (tested,) = quiet_trainer(tmp_path).test(model, loader, verbose=False)
    (validated,) = quiet_trainer(tmp_path).validate(model, loader, verbose=False)
    assert tested["test_accuracy"] == validated["val_accuracy"] == 1.0


def test_a_data_module_of_other_data_is_tested_by_name_and_predicted_as_ever(
    tmp_path: Path, model: StitchedClassifier
) -> None:
    data = CalibrationDataModule(renumbered(model, TWO), calibration_samples=4, batch_size=16)
    (tested,) = quiet_trainer(tmp_path).test(model, data, verbose=False)
    assert (data.class_names, tested["test_accuracy"]) == (TWO, 1.0)
    predicted = torch.cat(quiet_trainer(tmp_path).predict(model, data)).argmax(1)
    names = [TWO[label] for _, labels in data.predict_dataloader() for label in labels]
    assert [NAMES[label] for label in predicted] == names


def test_training_on_data_in_another_order_learns_the_models_order(tmp_path: Path, model: StitchedClassifier) -> None:
    train = renumbered(model, NAMES[::-1])
    seen: list[torch.Tensor] = []

    class Watched(StitchedClassifier):
        def _split_batch(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            images, targets = super()._split_batch(batch)
            if self.trainer.training:
                seen.append(targets)
            return images, targets

    watched = Watched(3, class_names=NAMES)
    watched.install(model.network, model.head)  # type: ignore[arg-type]
    validating = DataLoader(renumbered(model, TWO), batch_size=8)
    run = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1, val_check_interval=2)
    run.fit(watched, DataLoader(train, batch_size=16), validating)
    expected = [NAMES.index(NAMES[::-1][label]) for label in train.tensors[1].tolist()]
    assert torch.cat(seen).tolist() == expected * 2


def test_without_names_labels_are_left_as_they_are(tmp_path: Path, model: StitchedClassifier) -> None:
    dataset = renumbered(model, NAMES[::-1])
    (known,) = quiet_trainer(tmp_path).test(model, DataLoader(dataset, batch_size=16), verbose=False)
    del dataset.classes  # type: ignore[attr-defined]
    (unknown,) = quiet_trainer(tmp_path).test(model, DataLoader(dataset, batch_size=16), verbose=False)
    assert known["test_accuracy"] == 1.0 > unknown["test_accuracy"]


def test_a_class_that_the_model_does_not_know_is_named(tmp_path: Path, model: StitchedClassifier) -> None:
    dataset = renumbered(model, NAMES)
    dataset.classes = [*NAMES[:2], "fox"]  # type: ignore[attr-defined]
    with pytest.raises(
        CalibrationError, match=r"classes \['fox'\], which the model does not know; it knows \['digit_0'"
    ):
        quiet_trainer(tmp_path).test(model, DataLoader(dataset, batch_size=16), verbose=False)
