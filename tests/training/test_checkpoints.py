"""Checkpoints from strangers: each damage is an error in words, before memory is taken for what a recipe asks for."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from doubles.published_networks import classifier, outputs

from lightning_stitch import RecipeError, StitchedClassifier, StitchError
from lightning_stitch.training.checkpoints import open_classifier

GIANT = 10**11


def checkpoint_of(model: StitchedClassifier, folder: Path) -> Path:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "model.ckpt", weights_only=False)
    return folder / "model.ckpt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(classifier(), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def saved_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(classifier(kind="ensemble"), tmp_path_factory.mktemp("saved"))


def recipe_of(content: dict[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = content["hyper_parameters"]["recipe"]
    return recipe


def stitch_of(content: dict[str, Any]) -> dict[str, Any]:
    stitch: dict[str, Any] = recipe_of(content)["fragments"][1]["stitch"]
    return stitch


def source_of(content: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = recipe_of(content)["sources"][0]
    return source


def damaged(saved: Path, folder: Path, damage: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(saved, weights_only=True)
    damage(content)
    torch.save(content, folder / "damaged.ckpt")
    return folder / "damaged.ckpt"


def first(content: dict[str, Any], part: str = "network") -> str:
    return next(name for name in content["state_dict"] if name.startswith(part))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no weights": (lambda c: c.pop("state_dict"), "not a checkpoint of a StitchedClassifier"),
    "weights in a list": (lambda c: c.update(state_dict=[1]), "cannot be loaded"),
    "no recipe": (lambda c: c["hyper_parameters"].update(recipe=None), "holds no network"),
    "recipe in words": (lambda c: c["hyper_parameters"].update(recipe="a"), "A recipe is a dict"),
    "one weight less": (lambda c: c["state_dict"].pop(first(c)), "weights do not fit the recipe: .*Missing key"),
    "one weight more": (lambda c: c["state_dict"].update({"network.a": torch.zeros(1)}), "Unexpected key"),
    "a weight of words": (lambda c: c["state_dict"].update({first(c): "a"}), "do not fit the recipe"),
    "a weight of another shape": (lambda c: c["state_dict"].update({first(c): torch.zeros(7, 7)}), "size mismatch"),
    "a head of another shape": (lambda c: c["state_dict"].update({first(c, "head"): torch.zeros(7, 7)}), "size mismat"),
    "giant images": (lambda c: recipe_of(c).update(input_size=[3, GIANT, GIANT]), "cannot be loaded"),
    "negative images": (lambda c: recipe_of(c).update(input_size=[3, -1, 5]), "each at least 1"),
    "a giant stitch": (lambda c: stitch_of(c).update(out_channels=GIANT, placement="explicit"), "cannot be loaded"),
    "a negative stitch": (lambda c: stitch_of(c).update(in_channels=-4, placement="explicit"), "cannot be loaded"),
    "a giant tap": (lambda c: recipe_of(c)["taps"][0].update(channels=GIANT), "do not fit the recipe"),
    "giant sources": (lambda c: source_of(c)["arguments"].update(num_classes=GIANT), "cannot be loaded"),
    "another stretch": (lambda c: recipe_of(c)["fragments"][0].update(end="layer4"), "cannot be loaded"),
    "giant classes": (lambda c: c["hyper_parameters"].update(num_classes=GIANT, class_names=None), "do not fit"),
    "classes in words": (lambda c: c["hyper_parameters"].update(num_classes="a"), "cannot be loaded"),
    "names that are none": (lambda c: c["hyper_parameters"].update(class_names=5), "cannot be loaded"),
    "a head of another kind": (lambda c: c["hyper_parameters"].update(head={"name": [1]}), "cannot be loaded"),
    "thawed numbers": (lambda c: c["hyper_parameters"].update(thaw=5), "cannot be loaded"),
    "an epoch in words": (lambda c: c.update(epoch="a"), "cannot be loaded"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_words_and_in_little_memory(kind: str, saved: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[kind]
    path = damaged(saved, tmp_path, damage)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        with pytest.raises(StitchError, match=words) as refused:
            open_classifier(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert str(path) in str(refused.value)


def test_a_whole_checkpoint_is_opened(saved: Path) -> None:
    assert torch.equal(outputs(open_classifier(saved).eval()), outputs(classifier()))


@pytest.mark.parametrize("num_classes", [2, GIANT])
def test_classes_beside_an_ensembles_recipe_are_compared_with_it(
    num_classes: int, saved_ensemble: Path, tmp_path: Path
) -> None:
    change = {"num_classes": num_classes, "class_names": None}
    path = damaged(saved_ensemble, tmp_path, lambda c: c["hyper_parameters"].update(change))
    with pytest.raises(RecipeError, match=f"The recipe's members have 3 classes, but num_classes={num_classes}"):
        open_classifier(path)
    assert outputs(open_classifier(saved_ensemble).eval()).shape == (2, 3)
    folder = tmp_path / "folder"
    classifier(kind="ensemble").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["lightning_stitch"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="members have 3 classes"):
        StitchedClassifier.from_pretrained(folder)
