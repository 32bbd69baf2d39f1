from __future__ import annotations

import pytest

from lightning_stitch import _lightning
from lightning_stitch._lightning import pl
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError


@pytest.mark.parametrize(
    ("wanted", "loaded", "chosen"),
    [
        (None, [], "pytorch_lightning"),
        ("", ["sys", "lightning", "lightning.pytorch"], "lightning.pytorch"),
        (None, ["lightning.pytorch", "pytorch_lightning"], "lightning.pytorch"),
        (None, ["pytorch_lightning", "lightning.pytorch"], "pytorch_lightning"),
        (None, ["lightning", "lightning.fabric"], "pytorch_lightning"),
        ("lightning", ["pytorch_lightning"], "lightning.pytorch"),
        ("lightning.pytorch", [], "lightning.pytorch"),
        ("pytorch_lightning", ["lightning.pytorch"], "pytorch_lightning"),
    ],
)
def test_the_package_imported_first_is_used_unless_the_environment_names_one(wanted, loaded, chosen):
    assert _lightning._choose(wanted, loaded) == chosen


def test_a_package_that_does_not_exist_is_refused():
    with pytest.raises(StitchError, match="LIGHTNING_STITCH_NAMESPACE is 'torch'"):
        _lightning._choose("torch", [])


def test_objects_of_the_other_package_are_refused_by_both_names():
    other = next(name for name in ("pytorch_lightning", "lightning.pytorch") if name != _lightning.NAMESPACE)
    foreign = type("LightningDataModule", (), {"__module__": f"{other}.core.datamodule"})
    mine = type("Mine", (foreign,), {"__module__": "mine"})
    with pytest.raises(StitchError, match=r"datamodule \(Mine\) comes from .*pytorch.* uses .*lightning"):
        CalibrationDataModule(datamodule=mine())
    both = type("Both", (pl.LightningDataModule, foreign), {"__module__": "mine"})
    for accepted in (both(), pl.LightningDataModule(), object()):
        _lightning.check_same_namespace(accepted, "datamodule")
