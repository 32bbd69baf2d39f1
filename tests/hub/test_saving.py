from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubles.hub import HubDouble
from doubles.pools import calibrated_pool
from doubles.predictions import write_digits
from doubles.published_networks import (
    IMAGES,
    NAMES,
    STITCHED,
    classifier,
    network,
    outputs,
    own_factory,
    source_network,
    together,
)
from doubles.small_sources import live
from safetensors.torch import load_file

from lightning_stitch import (
    FragmentRef,
    Preprocessing,
    Recipe,
    RecipeError,
    StitchedClassifier,
    StitchedNetwork,
    StitchError,
    load_source,
    predict_files,
)
from lightning_stitch.training.checkpoints import open_classifier


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "network"
    network().save_pretrained(folder)
    return folder


def test_a_loaded_network_gives_the_same_outputs(saved: Path) -> None:
    loaded = StitchedNetwork.from_pretrained(saved)
    assert torch.equal(outputs(loaded), outputs(network()))
    assert loaded.recipe == network().recipe
    assert not any(module.training for module in loaded.modules())


def test_the_config_says_what_it_is_and_what_made_it(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = config["lightning_stitch"]
    assert own["recipe"] == model.recipe.to_dict()
    assert own["recipe"]["schema"] == 3
    assert [source["preprocessing"]["mean"] for source in own["recipe"]["sources"]] == [
        list(ref.preprocessing.mean) for ref in model.recipe.sources
    ]
    assert (own["kind"], own["task"], own["class_names"], config["label_names"]) == (
        "classifier",
        "multiclass",
        NAMES,
        NAMES,
    )
    assert own["versions"].keys() == {"lightning_stitch", "torch", "torchvision", "timm"}
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert own["weights"] == {
        "file": "model.safetensors",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
    }


@pytest.mark.slow
def test_another_process_loads_it_with_neither_sources_nor_a_network_connection(saved: Path) -> None:
    script = f"""
import socket, sys, torch
def refused(*arguments): raise AssertionError("no connection is needed")
socket.socket.connect = refused
import lightning_stitch as ls
network = ls.StitchedNetwork.from_pretrained({str(saved)!r})
with torch.no_grad():
    print(network(torch.load(sys.stdin.buffer)).flatten().tolist())
"""
    with (saved.parent / "images.pt").open("wb") as file:
        torch.save(IMAGES, file)
    with (saved.parent / "images.pt").open("rb") as images:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(saved.parent / "empty")}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdin=images, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout)).reshape(outputs(network()).shape)
    torch.testing.assert_close(found, outputs(network()))


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ridge", "multiclass"),
        ("ridge", "multilabel"),
        ("ridge", "regression"),
        ("knn", "multiclass"),
        ("none", "multiclass"),
        ("class_map", "multiclass"),
    ],
)
def test_a_classifier_travels_with_head_task_and_class_names(head: str, task: str, tmp_path: Path) -> None:
    model = classifier(head, task)
    model.save_pretrained(tmp_path)
    loaded = StitchedClassifier.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.class_names == model.class_names
    assert loaded.head_settings == model.head_settings
    assert loaded.recipe == model.recipe


def test_an_ensemble_travels_alone_and_as_a_classifier(tmp_path: Path) -> None:
    members = together()
    members.save_pretrained(tmp_path / "alone")
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(tmp_path / "alone")), outputs(members))
    model = classifier(kind="ensemble")
    model.save_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(tmp_path / "classifier")), outputs(model))


def test_a_classifiers_folder_also_gives_the_network_without_its_head(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(tmp_path)), outputs(network()))


def test_a_networks_folder_is_no_classifier(saved: Path) -> None:
    with pytest.raises(RecipeError, match=r"StitchedNetwork\.from_pretrained loads, not StitchedClassifier"):
        StitchedClassifier.from_pretrained(saved)


def test_images_files_are_predicted_from_a_saved_folder_alike(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images", 3)
    model = classifier()
    model.save_pretrained(tmp_path / "model")
    rows = predict_files(open_classifier(tmp_path / "model"), images)
    assert rows == predict_files(model, images)
    assert {row["class"] for row in rows} <= set(NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_weights_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    original = StitchedNetwork.from_recipe(network().recipe).to(dtype)
    original.save_pretrained(tmp_path)
    loaded = StitchedNetwork.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES.to(dtype)), original(IMAGES.to(dtype)))


def test_a_healed_network_travels_with_what_was_changed(tmp_path: Path) -> None:
    pool = calibrated_pool("test_convnext", "test_resnet")
    healed = pool.assemble(pool.stitch(STITCHED, heal=True))
    assert healed.recipe.healed
    assert not torch.equal(outputs(healed), outputs(network()))
    healed.save_pretrained(tmp_path)
    loaded = StitchedNetwork.from_pretrained(tmp_path)
    assert loaded.recipe == healed.recipe
    assert torch.equal(outputs(loaded), outputs(healed))


def test_an_early_exit_travels(tmp_path: Path) -> None:
    ref = load_source("test_resnet", pretrained=False).ref
    fragments = (FragmentRef(ref.name, None, "layer3"),)
    recipe = Recipe.chain((ref,), fragments, num_features=192, input_size=(3, 32, 32), averaged=True)
    exit_ = StitchedNetwork.from_recipe(recipe).eval()
    exit_.save_pretrained(tmp_path)
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(tmp_path)), outputs(exit_))


@pytest.mark.parametrize("share_weights", [False, True])
def test_what_fragments_share_is_written_once_and_is_shared_again(share_weights: bool, tmp_path: Path) -> None:
    original = network(twice=True, share_weights=share_weights)
    original.save_pretrained(tmp_path)
    written = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert written == sum(tensor.numel() for tensor in (*original.parameters(), *original.buffers()))
    assert (written < sum(tensor.numel() for tensor in original.state_dict().values())) is share_weights
    loaded = StitchedNetwork.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(original))
    # what was one parameter is one again, what were two alike are two
    assert len(list(loaded.parameters())) == len(list(original.parameters()))


def test_a_loaded_network_does_not_depend_on_its_file(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copied")
    loaded = StitchedNetwork.from_pretrained(tmp_path / "copied")
    os.truncate(tmp_path / "copied" / "model.safetensors", 0)
    assert torch.equal(outputs(loaded), outputs(network()))


def test_only_the_fragments_that_are_used_are_written(saved: Path) -> None:
    written = sum(t.numel() for t in load_file(saved / "model.safetensors").values())
    own = {**dict(network().named_buffers()), **network().state_dict()}
    assert written == sum(t.numel() for t in own.values())


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model.save_pretrained(tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_was_written_over_loads_from_the_hub_too(tmp_path: Path, hub: HubDouble) -> None:
    saved = tmp_path / "network"
    network().save_pretrained(saved)
    network(twice=True).save_pretrained(saved, overwrite=True)
    assert not (saved / "model.safetensors").exists()
    hub.publish("org/mine", saved)
    assert torch.equal(outputs(StitchedNetwork.from_pretrained("org/mine")), outputs(network(twice=True)))


def test_what_is_there_is_not_overwritten_untold(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(
        StitchError, match=r"already holds config\.json, model\.safetensors, README\.md.*overwrite=True"
    ):
        network().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    network().save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() != "mine"


def test_a_module_without_a_network_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="has no network yet, so there is nothing to save"):
        StitchedClassifier(num_classes=2).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_live_module_cannot_be_saved_and_the_exported_program_can(tmp_path: Path) -> None:
    built = source_network(live(own_factory(), "mine", size=16))
    with pytest.raises(RecipeError, match=r"'mine' was given as a live module.*python:.*network\.export") as error:
        built.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    images = IMAGES[..., :16, :16]
    offered = str(error.value)[str(error.value).index("network.export") :].rstrip(".")
    path = tmp_path / "network.pt2"
    exec(offered.replace("'network.pt2'", "path"), {"network": built, "path": path})
    (features,) = torch.export.load(path).module()(images)
    torch.testing.assert_close(features, built(images), rtol=1e-4, atol=1e-5)


def test_a_factory_is_called_only_where_it_is_trusted(tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    built = source_network(load_source("python:doubles.published_networks:own_factory", preprocessing=preprocessing))
    built.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"import 'doubles.published_networks' and call .*trust_factory=True"):
        StitchedNetwork.from_pretrained(tmp_path)
    loaded = StitchedNetwork.from_pretrained(tmp_path, trust_factory=True)
    images = IMAGES[..., :16, :16]
    assert torch.equal(loaded(images), built(images))
