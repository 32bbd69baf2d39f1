from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import live
from prediction_doubles import write_digits
from published_networks import IMAGES, NAMES, classifier, network, outputs, own_factory, together
from safetensors.torch import load_file, save_file

from lightning_stitch import (
    CutGraph,
    Ensemble,
    FragmentRef,
    Preprocessing,
    Recipe,
    RecipeError,
    SourceError,
    StitchedClassifier,
    StitchedNetwork,
    StitchError,
    load_source,
    predict_files,
)
from lightning_stitch.network import assemble
from lightning_stitch.predicting import open_classifier
from lightning_stitch.sources import Source


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "network"
    network().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in saved.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def rewrite(folder: Path, change: Any) -> None:
    """Change what a folder's config holds of this package's."""
    config = json.loads((folder / "config.json").read_text())
    change(config["lightning_stitch"])
    (folder / "config.json").write_text(json.dumps(config))


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with the right hash, as somebody who means harm would have them."""
    path = folder / "model.safetensors"
    save_file(tensors, path)
    weights = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    rewrite(folder, lambda own: own.update(weights=weights))


def source_network(source: Source) -> StitchedNetwork:
    """A network of one whole source."""
    size = source.preprocessing.input_size
    recipe = Recipe((source.ref,), (FragmentRef(source.name, None, None),), input_size=size)
    return assemble(recipe, {source.name: CutGraph(source.module, size)}, [])


def test_a_loaded_network_gives_the_same_outputs(saved: Path) -> None:
    loaded = StitchedNetwork.from_pretrained(saved)
    assert torch.equal(outputs(loaded), outputs(network()))
    assert loaded.recipe == network().recipe
    assert not any(module.training for module in loaded.modules())


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
        ("class_mean", "multiclass"),
        ("none", "multiclass"),
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
    assert torch.equal(outputs(Ensemble.from_pretrained(tmp_path / "alone")), outputs(members))
    model = classifier(kind="ensemble")
    model.save_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(tmp_path / "classifier")), outputs(model))
    with pytest.raises(RecipeError, match=r"holds what Ensemble\.from_pretrained loads, not StitchedNetwork"):
        StitchedNetwork.from_pretrained(tmp_path / "alone")


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


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_fragment_that_is_used_twice_is_written_once(share_weights: bool, tmp_path: Path) -> None:
    original = network(twice=True, share_weights=share_weights)
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors").values()
    large = [t for t in tensors if t.nbytes >= 1024]
    assert len({hashlib.sha256(t.numpy().tobytes()).digest() for t in large}) == len(large)
    assert sum(t.numel() for t in tensors) < sum(t.numel() for t in original.state_dict().values())
    loaded = StitchedNetwork.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(original))
    # what was one parameter is one again, what were two alike are two
    assert len(list(loaded.parameters())) == len(list(original.parameters()))


def test_only_the_fragments_that_are_used_are_written(saved: Path) -> None:
    written = sum(t.numel() for t in load_file(saved / "model.safetensors").values())
    assert written == sum(t.numel() for t in network().state_dict().values())


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model.save_pretrained(tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_there_is_not_overwritten_untold(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(
        StitchError, match=r"already holds config\.json, model\.safetensors, README\.md.*overwrite=True"
    ):
        network().save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    network().save_pretrained(folder, overwrite=True)
    assert (folder / "README.md").read_text() != "mine"


def test_a_module_without_a_network_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="has no network yet, so there is nothing to save"):
        StitchedClassifier(num_classes=2).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_live_module_cannot_be_saved_and_the_exported_program_can(tmp_path: Path) -> None:
    built = source_network(live(own_factory(), "mine", size=16))
    with pytest.raises(RecipeError, match=r"'mine' was given as a live module.*python:.*torch\.export\.save") as error:
        built.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    images = IMAGES[..., :16, :16]
    offered = str(error.value)[str(error.value).index("torch.export.save") :].rstrip(".")
    path = tmp_path / "network.pt2"
    exec(offered.replace("'network.pt2'", "path"), {"torch": torch, "network": built, "images": images, "path": path})
    torch.testing.assert_close(torch.export.load(path).module()(images), built(images))


def test_a_factory_is_called_only_where_it_is_trusted(tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    built = source_network(load_source("python:published_networks:own_factory", preprocessing=preprocessing))
    built.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"import 'published_networks' and call .*trust_factory=True"):
        StitchedNetwork.from_pretrained(tmp_path)
    loaded = StitchedNetwork.from_pretrained(tmp_path, trust_factory=True)
    images = IMAGES[..., :16, :16]
    assert torch.equal(loaded(images), built(images))


def test_newer_keys_warn_and_are_left_out(folder: Path) -> None:
    def newer(own: dict[str, Any]) -> None:
        own["mood"] = "sunny"
        own["recipe"]["flavour"] = 1
        own["recipe"]["sources"][0]["preprocessing"]["gamma"] = 2.2

    rewrite(folder, newer)
    with pytest.warns(UserWarning, match="does not know and leaves out") as caught:
        loaded = StitchedNetwork.from_pretrained(folder)
    words = [str(warning.message) for warning in caught]
    assert ["has mood, which this version" in words[0], "gamma, Recipe.flavour, which" in words[1]] == [True, True]
    assert len(words) == 2
    assert torch.equal(outputs(loaded), outputs(network()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.update(format=2), r"saved in format 2; this version .* reads format 1"),
        (lambda own: own["recipe"].update(schema=99), r"recipe has schema 99"),
        (lambda own: own.pop("recipe"), r"A recipe is a dict"),
        (lambda own: own["recipe"].pop("fragments"), r"no recipe of schema 1: 'fragments'"),
        (lambda own: own.pop("weights"), r"malformed: kind, weights or shared"),
        (lambda own: own.update(kind="other"), r"malformed: kind, weights or shared"),
        (lambda own: own["weights"].update(sha256="0" * 64), r"not the file that its config.json was written with"),
        (lambda own: own["weights"].update(bytes=5), r"has \d+ bytes; its config.json was written with one of 5"),
        (lambda own: own["recipe"]["sources"][0].update(architecture="no_such_net"), r"knows no model 'no_such_net'"),
        (lambda own: own["recipe"]["fragments"][0].update(end="nowhere"), r"does not fit its sources.*'nowhere'"),
        (lambda own: own["recipe"]["sources"][0]["arguments"].update(pretrained=True), r"read files or the network"),
        (lambda own: own.update(shared={"network.x": "network.y"}), r"share \['network.y'\], which are not there"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: Any, words: str, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(RecipeError, match=words):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"architecture": "resnet18"}', "[" * 100_000])
def test_a_config_of_something_else_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(RecipeError, match="is not that of a stitched network"):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(("kind", "words"), [("link", "is a link"), ("pipe", "no plain file"), ("none", "holds no")])
def test_what_is_no_plain_file_in_the_folder_is_refused(file: str, kind: str, words: str, folder: Path) -> None:
    path = folder / file
    path.rename(folder.parent / file)
    if kind == "link":
        path.symlink_to(folder.parent / file)
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(StitchError, match=words):
        StitchedNetwork.from_pretrained(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "sprung",)

    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    content = (folder / "model.safetensors").read_bytes()
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(folder, lambda own: own.update(weights=weights))
    with pytest.raises(RecipeError, match="is no safetensors file"):
        StitchedNetwork.from_pretrained(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape", "dtype"])
def test_weights_that_do_not_fit_the_recipe_are_refused(spoil: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
    if spoil == "missing":
        tensors["network.other"] = tensors.pop(name)
    elif spoil == "extra":
        tensors["network.other"] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:, :1].contiguous() if spoil == "shape" else tensors[name].long()
    replace_weights(folder, tensors)
    words = {
        "missing": f"1 tensors are missing \\({name}\\), 1 have no place",
        "extra": r"0 tensors are missing \(none\), 1 have no place in it \(network\.other\)",
        "shape": f"{name} is torch.float32 of shape",
        "dtype": f"{name} is torch.int64 of shape",
    }[spoil]
    with pytest.raises(RecipeError, match=words):
        StitchedNetwork.from_pretrained(folder)


def test_a_recipe_of_giants_is_refused_before_memory_is_allocated(folder: Path) -> None:
    # 4e12 bytes of classifier alone, which no machine has
    rewrite(folder, lambda own: own["recipe"]["sources"][1].update(arguments={"num_classes": 10**10}))
    rewrite(folder, lambda own: own["recipe"]["fragments"][1].update(end=None))
    with pytest.raises(RecipeError, match=r"do not fit its recipe: 2 tensors are missing"):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nowhere", "'nowhere' is neither a folder nor a hub repository"),
        ("a/b/c", "'a/b/c' is neither a folder nor a hub repository"),
        ("me/name@", "'me/name@' is neither"),
        ("local-dir:nowhere", "There is no folder 'nowhere'"),
        (Path("me/name"), "There is no folder 'me/name'"),
    ],
)
def test_a_place_that_is_none_is_refused(where: str | Path, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        StitchedNetwork.from_pretrained(where)
