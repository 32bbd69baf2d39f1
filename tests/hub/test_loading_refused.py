from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doubles.published_networks import classifier, network, outputs, source_network
from doubles.tensors import noise
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_stitch import RecipeError, SourceError, StitchedClassifier, StitchedNetwork, StitchError, load_source

# 4e13 bytes and more of classifier, which no machine has
GIANT = {"num_classes": 10**11}


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


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


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
    rewrite(folder, lambda own: own["weights"].update(weights))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.update(format=3), r"saved in format 3; this version .* reads format 2"),
        (lambda own: own.update(mood="sunny"), r"has mood, which this version .* does not know\. Upgrade"),
        (lambda own: own["recipe"].update(flavour=1), r"recipe in config\.json .* cannot be used: .*'flavour'"),
        (lambda own: own["recipe"]["sources"][0]["preprocessing"].update(gamma=2.2), r"cannot be used: .*'gamma'"),
        (lambda own: own["recipe"].update(schema=99), r"recipe has schema 99"),
        (lambda own: own.pop("recipe"), r"recipe has schema None"),
        (lambda own: own["recipe"].pop("fragments"), r"no recipe of schema 3: .*'fragments'"),
        (lambda own: own.pop("weights"), r"malformed: kind or weights"),
        (lambda own: own.update(kind="other"), r"malformed: kind or weights"),
        (lambda own: own["weights"].update(sha256="0" * 64), r"not the file that its config.json was written with"),
        (lambda own: own["recipe"]["sources"][0].update(architecture="no_such_net"), r"knows no model 'no_such_net'"),
        (lambda own: own["recipe"]["fragments"][0].update(end="nowhere"), r"does not fit its sources.*'nowhere'"),
        (lambda own: own["recipe"]["sources"][0]["arguments"].update(pretrained=True), r"read files or the network"),
        (lambda own: own["recipe"]["sources"][0]["preprocessing"].update(std=[1, 0, 1]), r"one positive std for each"),
        (lambda own: own["weights"].update(bytes="5"), r"malformed: kind or weights"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: Any, words: str, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(RecipeError, match=words):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"architecture": "resnet18"}', "[" * 100_000])
def test_a_config_of_something_else_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(RecipeError, match="is not that of a stitched network"):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("<!DOCTYPE html>\n<p>Sign in</p>", "is a web page")])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_a_download_left_in_place_of_a_file_is_called_that(file: str, text: str, words: str, folder: Path) -> None:
    (folder / file).write_text(text)
    with pytest.raises(SourceError, match=words):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "none"])
def test_what_is_no_file_is_refused(file: str, kind: str, folder: Path) -> None:
    path = folder / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(StitchError, match=f"holds no file {file}"):
        StitchedNetwork.from_pretrained(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "sprung",)

    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    content = (folder / "model.safetensors").read_bytes()
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(folder, lambda own: own["weights"].update(weights))
    with pytest.raises(RecipeError, match="is no safetensors file"):
        StitchedNetwork.from_pretrained(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape", "dtype"])
def test_weights_that_do_not_fit_the_recipe_are_refused(spoil: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(
        name
        for name, tensor in tensors.items()
        if name.endswith("weight") and tensor.dim() == 4 and tensor.shape[1] > 1
    )
    if spoil == "missing":
        tensors["network.other"] = tensors.pop(name)
    elif spoil == "extra":
        tensors["network.other"] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:, :1].contiguous() if spoil == "shape" else tensors[name].long()
    replace_weights(folder, tensors)
    words = {
        "missing": rf"missing are \['{name}'\], without a place \['network\.other'\]",
        "extra": r"missing are \[\], without a place \['network\.other'\]",
        "shape": f"size mismatch for {name}: ",
        "dtype": rf"{name} is torch\.int64, expected is torch\.float32",
    }[spoil]
    with pytest.raises(RecipeError, match=words):
        StitchedNetwork.from_pretrained(folder)


def test_an_architecture_that_reads_numbers_while_it_is_built_travels_and_is_checked_alike(tmp_path: Path) -> None:
    # torchvision computes the widths of its RegNets with tensors
    built = source_network(load_source("torchvision:regnet_y_400mf", pretrained=False))
    built.save_pretrained(tmp_path)
    loaded = StitchedNetwork.from_pretrained(tmp_path)
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), built(images))
    # 2e12 bytes of classifier
    rewrite(tmp_path, lambda own: own["recipe"]["sources"][0].update(arguments={"num_classes": 10**9}))
    rewrite(tmp_path, lambda own: own["recipe"]["taps"][0].update(channels=10**9))
    with pytest.raises(RecipeError, match=r"size mismatch for .*torch\.Size\(\[1000000000, 440\]\)"):
        StitchedNetwork.from_pretrained(tmp_path)


def test_a_structure_that_cannot_be_built_without_memory_is_not_built_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def reading(architecture: str, **options: Any) -> nn.Module:
        built.append(torch.empty(()).device.type)
        return nn.Linear(int(torch.zeros(1).item()), 1)

    monkeypatch.setattr(timm, "create_model", reading)
    with pytest.raises(RecipeError, match="cannot be rebuilt: timm could not build"):
        StitchedNetwork.from_pretrained(folder)
    assert set(built) == {"meta"}


def test_folders_of_the_machine_are_not_written(folder: Path, tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "secret" / "one"), safe_serialization=True)
    built = source_network(load_source(f"local-dir:{tmp_path}/secret/one"))
    built.save_pretrained(tmp_path / "saved")
    written = [file.read_bytes() for file in (tmp_path / "saved").iterdir()]
    assert len(written) == 4
    assert not any(b"secret" in content for content in written)
    assert StitchedNetwork.from_pretrained(tmp_path / "saved").recipe.sources[0].spec == "local-dir:one"


def test_a_recipe_of_giants_is_refused_before_memory_is_allocated(folder: Path) -> None:
    # 4e12 bytes of classifier alone, which no machine has
    rewrite(folder, lambda own: own["recipe"]["sources"][1].update(arguments={"num_classes": 10**10}))
    rewrite(folder, lambda own: own["recipe"]["fragments"][1].update(end=None))
    rewrite(folder, lambda own: own["recipe"]["taps"][0].update(channels=10**10))
    with pytest.raises(RecipeError, match=r"do not fit its recipe: missing are \[.*weight"):
        StitchedNetwork.from_pretrained(folder)


def unused_source(own: dict[str, Any]) -> None:
    """One more source, giant, that no fragment comes from."""
    own["recipe"]["sources"].append({**own["recipe"]["sources"][0], "name": "other", "arguments": GIANT})


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own["recipe"]["sources"][0].update(arguments=GIANT),
        unused_source,
        lambda own: own["recipe"].update(input_size=[3, 100_000, 100_000]),
    ],
    ids=["a classifier that no fragment has", "a source that no fragment has", "giant images"],
)
def test_what_the_fragments_do_not_have_takes_no_memory(change: Any, folder: Path) -> None:
    rewrite(folder, change)
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(folder)), outputs(network()))


def test_nothing_is_built_for_a_factory_that_is_not_trusted(folder: Path) -> None:
    rewrite(folder, lambda own: own["recipe"]["sources"][0].update(arguments=GIANT))
    rewrite(folder, lambda own: own["recipe"]["sources"][1].update(builder="python", architecture="no_such:factory"))
    with pytest.raises(RecipeError, match=r"import 'no_such' and call .*trust_factory=True"):
        StitchedNetwork.from_pretrained(folder)


def test_a_tensor_that_the_file_lacks_and_no_other_name_has_is_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("weight")]
    replace_weights(folder, {name: tensor for name, tensor in tensors.items() if name != names[0]})
    with pytest.raises(RecipeError, match=f"missing are \\['{names[0]}'\\]"):
        StitchedNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head.rows": 0, "head.targets": 0}, "0 images, 0 targets"),
        ({"head.targets": 5}, "30 images, 5 targets"),
        ({"head.num_neighbours": torch.tensor(31)}, "30 images, 30 targets, 31 neighbours"),
        ({"head.num_neighbours": torch.tensor(-3)}, "-3 neighbours"),
    ],
)
def test_a_head_of_neighbours_that_does_not_fit_itself_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    classifier("knn").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, value in change.items():
        tensors[name] = tensors[name][:value].clone() if isinstance(value, int) else value
    replace_weights(tmp_path, tensors)
    with pytest.raises(RecipeError, match=words):
        StitchedClassifier.from_pretrained(tmp_path)


def test_a_class_map_in_words_is_refused(tmp_path: Path) -> None:
    classifier("class_map").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda own: own["head"]["classes"].update(few="0-150000000"))
    with pytest.raises(RecipeError, match="a saved class map has indices, not words"):
        StitchedClassifier.from_pretrained(tmp_path)


def test_an_overwrite_that_fails_leaves_the_network_that_was_there(folder: Path) -> None:
    new, files = network(twice=True), {file.name: file.read_bytes() for file in folder.iterdir()}
    # A disk with room for some of the weights.
    with disk_of(60_000), pytest.raises(StitchError, match=rf"{folder} cannot be written to: .*Make room"):
        new.save_pretrained(folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(folder)), outputs(network()))


def test_a_card_that_cannot_be_written_is_named_and_the_old_one_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, opened = (folder / "README.md").read_bytes(), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.startswith("README.md"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StitchError, match=r"README\.md cannot be written: Read-only file system\. Make room or get"):
        network().save_pretrained(folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / "README.md").read_bytes() == card


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_an_overwrite_that_is_killed_between_renames_leaves_one_network_or_the_other(
    renames: int, again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = network(), network(twice=True)
    if again:
        # so that the weights that are there have their other name
        new.save_pretrained(folder, overwrite=True)
        old.save_pretrained(folder, overwrite=True)
        new.save_pretrained(folder, overwrite=True)
        old, new = new, old
    replace, done = os.replace, []

    def killed(*paths: Any) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(folder, overwrite=True)
    monkeypatch.undo()
    there = StitchedNetwork.from_pretrained(folder)
    assert torch.equal(outputs(there), outputs(new if renames == 3 else old))
    # and a later call puts in order what was left behind
    new.save_pretrained(folder, overwrite=True)
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert torch.equal(outputs(StitchedNetwork.from_pretrained(folder)), outputs(new))


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StitchError, match=r"already holds README\.md"):
        network().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "elsewhere").exists()


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
