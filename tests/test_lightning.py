from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from doubles.predictions import quiet_trainer
from torch.utils.data import TensorDataset

from lightning_stitch import _lightning
from lightning_stitch._lightning import NAMESPACE, pl
from lightning_stitch.cli.main import main
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.training.fragment_search import FragmentSearch
from lightning_stitch.training.module import StitchedClassifier
from lightning_stitch.training.predicting import PredictionWriter, predict_files
from lightning_stitch.training.publish_after_fit import PublishAfterFit

OTHER = next(name for name in ("pytorch_lightning", "lightning.pytorch") if name != NAMESPACE)
SEARCH = {"sources": [{"spec": "test_resnet", "pretrained": False}]}
# Both packages by name, and the variable that mends it.
WORDS = rf"comes from '{OTHER}', but lightning_stitch uses '{NAMESPACE}' .* LIGHTNING_STITCH_NAMESPACE={OTHER[:9]}"


def foreign(kind: str, **attributes: Any) -> Any:
    """An object of a user's class that inherits from a class of the other package, which is not installed."""
    base = type(kind, (), {"__module__": f"{OTHER}.core"})
    return type("Mine", (base,), {"__module__": "mine", **attributes})()


def images() -> CalibrationDataModule:
    pool = TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 3)
    return CalibrationDataModule(pool, image_size=32, calibration_samples=8)


@pytest.mark.parametrize(
    ("wanted", "loaded", "installed", "chosen"),
    [
        (None, [], ["pytorch_lightning"], "pytorch_lightning"),
        (None, [], ["lightning", "pytorch_lightning"], "pytorch_lightning"),
        (None, [], ["lightning"], "lightning.pytorch"),
        (None, [], [], "pytorch_lightning"),
        ("", ["sys", "lightning", "lightning.pytorch"], [], "lightning.pytorch"),
        (None, ["lightning.pytorch", "pytorch_lightning"], [], "lightning.pytorch"),
        (None, ["pytorch_lightning", "lightning.pytorch"], [], "pytorch_lightning"),
        (None, ["lightning", "lightning.fabric"], ["lightning", "pytorch_lightning"], "pytorch_lightning"),
        ("lightning", ["pytorch_lightning"], ["pytorch_lightning"], "lightning.pytorch"),
        ("lightning.pytorch", [], [], "lightning.pytorch"),
        ("pytorch_lightning", ["lightning.pytorch"], ["lightning"], "pytorch_lightning"),
    ],
)
def test_the_package_imported_first_is_used_unless_the_environment_names_one_or_only_one_is_installed(
    wanted: str | None, loaded: list[str], installed: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lightning, "find_spec", lambda name: name if name in installed else None)
    assert _lightning._choose(wanted, loaded) == chosen


def test_a_package_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StitchError, match="LIGHTNING_STITCH_NAMESPACE is 'torch'"):
        _lightning._choose("torch", [])


def test_objects_of_the_other_package_are_refused_by_both_names() -> None:
    with pytest.raises(StitchError, match=rf"datamodule \(Mine\) {WORDS}"):
        CalibrationDataModule(datamodule=foreign("LightningDataModule"))
    with pytest.raises(StitchError, match=rf"module \(Mine\) {WORDS}"):
        predict_files(foreign("LightningModule"), "images")
    both = type("Both", (pl.LightningDataModule, type(foreign("LightningDataModule"))), {"__module__": "mine"})
    for accepted in (both(), pl.LightningDataModule(), object()):
        _lightning.check_same_namespace(accepted, "datamodule")


def test_a_trainer_of_the_other_package_is_refused_by_every_callback() -> None:
    trainer, model = foreign("Trainer", datamodule=None), StitchedClassifier(num_classes=3)
    for callback in (FragmentSearch(**SEARCH), PublishAfterFit("me/mine"), PredictionWriter()):
        with pytest.raises(StitchError, match=rf"Trainer \(Mine\) {WORDS}"):
            callback.setup(trainer, model, "fit")


@pytest.mark.parametrize("attribute", [None, "backbone"])
def test_a_module_of_the_other_package_is_refused_by_the_search(attribute: str | None, tmp_path: Path) -> None:
    search = FragmentSearch(**SEARCH, attribute=attribute)
    with pytest.raises(StitchError, match=rf"module \(Mine\) {WORDS}"):
        search.check_run(quiet_trainer(tmp_path), foreign("LightningModule"), images())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(
    ("by_name", "words"), [(True, "Expected a parent"), (False, "needs a CalibrationDataModule, .* found none")]
)
def test_a_data_module_of_the_other_package_is_no_data_module_and_the_warning_before_tells_why(
    by_name: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, OTHER, ModuleType(OTHER))
    monkeypatch.delenv("LIGHTNING_STITCH_NAMESPACE", raising=False)
    with pytest.warns(UserWarning, match=f"each refuses the other's .*data modules.* uses '{NAMESPACE}'"):
        model, search = StitchedClassifier(num_classes=3), FragmentSearch(["no such source"])
    data = foreign("LightningDataModule", on_exception=lambda self, error: None)
    trainer = quiet_trainer(tmp_path, callbacks=[search])
    with pytest.raises((ValueError, StitchError), match=words):
        trainer.fit(model, **{"datamodule" if by_name else "train_dataloaders": data})


@pytest.mark.parametrize("make", [lambda: StitchedClassifier(num_classes=3), lambda: FragmentSearch(**SEARCH)])
def test_where_both_are_loaded_and_none_is_named_a_warning_says_whose_classes_these_are(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIGHTNING_STITCH_NAMESPACE", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
    monkeypatch.setitem(sys.modules, OTHER, ModuleType(OTHER))
    with pytest.warns(
        UserWarning, match=f"are both loaded, .* uses '{NAMESPACE}' .*, or set LIGHTNING_STITCH_NAMESPACE"
    ):
        make()
    monkeypatch.setenv("LIGHTNING_STITCH_NAMESPACE", NAMESPACE.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_a_class_that_the_command_line_refuses_comes_with_a_hint_where_both_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    printed = []
    for both in (False, True):
        if both:
            monkeypatch.setitem(sys.modules, OTHER, ModuleType(OTHER))
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--model", "torch.nn.Linear"])
        printed.append(capsys.readouterr().err)
    assert "note: " not in printed[0]
    assert "note: 'pytorch_lightning' and 'lightning.pytorch' are both loaded" in printed[1]
    assert f"lightning_stitch uses '{NAMESPACE}' in this process." in printed[1]
