from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doubles.hub import HubDouble
from doubles.small_sources import assert_same_weights
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from lightning_stitch.errors import SourceError
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.finding import find_source
from lightning_stitch.sources.source import build_architecture, load_source, load_sources
from lightning_stitch.sources.spec import SourceSpec


def donor(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


# Folders


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_folder_gives_the_weights_of_its_file_strictly(tmp_path: Path, name: str) -> None:
    model = donor(name, num_classes=5, drop_rate=0.25)
    timm.models.save_for_hf(model, str(tmp_path / "it"), safe_serialization=True)
    source = load_source(f"local-dir:{tmp_path / 'it'}")
    assert_same_weights(source.module, model.state_dict())
    assert source.name == "it"
    assert source.ref.architecture == name
    assert source.ref.arguments["num_classes"] == 5
    images = torch.randn(2, *source.preprocessing.input_size)
    assert torch.equal(source.module(images), model(images))
    assert shapes(build_architecture(source.ref)) == shapes(model)


def test_rebuilding_a_folder_source_needs_no_folder(folder: Path) -> None:
    source = load_source(f"local-dir:{folder}")
    for file in folder.iterdir():
        file.unlink()
    assert shapes(build_architecture(source.ref)) == shapes(source.module)


def test_folder_of_another_size_and_channels_is_rebuilt_alike(tmp_path: Path) -> None:
    size = {"img_size": 96, "in_chans": 1}
    model = donor("test_vit", **size)
    timm.models.save_for_hf(model, str(tmp_path), model_args=size, safe_serialization=True)
    source = load_source(f"local-dir:{tmp_path}", preprocessing=Preprocessing((1, 96, 96), (0.5,), (0.5,)))
    assert_same_weights(source.module, model.state_dict())
    assert shapes(build_architecture(source.ref)) == shapes(model)


def test_old_flat_config_is_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    flat = {**config["pretrained_cfg"], "architecture": "test_resnet", "num_classes": 5, "from_the_future": 1}
    (folder / "config.json").write_text(json.dumps(flat))
    assert_same_weights(load_source(f"local-dir:{folder}").module, load_file(folder / "model.safetensors"))


def test_licence_of_the_folder_and_overrides(folder: Path) -> None:
    assert load_source(f"local-dir:{folder}").licence == "mit"
    preprocessing = Preprocessing((3, 64, 64), (0.0,) * 3, (1.0,) * 3, "nearest", True)
    source = load_source(f"local-dir:{folder}", name="mine", licence="cc0-1.0", preprocessing=preprocessing)
    assert (source.name, source.licence, source.preprocessing) == ("mine", "cc0-1.0", preprocessing)


def test_folder_without_weights_still_gives_random_ones(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    source = load_source(f"local-dir:{folder}", pretrained=False)
    assert source.module.num_classes == 5
    with pytest.raises(SourceError, match=r"no model.safetensors, but config.json. Take pretrained=False"):
        find_source(SourceSpec(f"local-dir:{folder}"))


def test_pickled_weights_are_refused_and_the_advice_works(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"Reading pytorch_model.bin could run code.*only safetensors") as refused:
        load_source(f"local-dir:{folder}")
    advice = str(refused.value).partition("convert it once: ")[2].removesuffix(".")
    eval(advice, {"timm": timm})
    assert_same_weights(load_source(f"local-dir:{folder}").module, expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not in timm's layout.*JSONDecodeError"),
        ("[]", "not in timm's layout"),
        ('{"model_type": "vit"}', "not in timm's layout.*KeyError: 'architecture'"),
        ('{"architecture": "resnt50"}', "no model 'resnt50'. Nearest: 'resnet50'"),
        ('{"architecture": "test_resnet", "pretrained_cfg": {"mean": 0.5}}', "its preprocessing cannot be read"),
        ('{"architecture": "test_resnet", "pretrained_cfg": {"std": [1, 0, 1]}}', "one positive std for each"),
        ('{"architecture": "test_resnet", "model_args": {"checkpoint_path": "x"}}', "may not hold"),
        (None, "holds no config.json, but model.safetensors"),
    ],
)
def test_config_that_cannot_be_used(folder: Path, content: str | None, words: str) -> None:
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(SourceError, match=f"(?s){words}"):
        find_source(SourceSpec(f"local-dir:{folder}"))


def rename_one(weights: dict[str, torch.Tensor]) -> None:
    weights["strange"] = weights.pop("fc.weight")


def reshape_one(weights: dict[str, torch.Tensor]) -> None:
    weights["fc.bias"] = torch.zeros(9)


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["bn1.running_var"][0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (rename_one, 'Missing key.*"fc.weight".*Unexpected key.*"strange"'),
        (reshape_one, "size mismatch for fc.bias"),
        (poison, r"1 of \d+ weight tensors hold NaN \(bn1.running_var\)"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, damage: Callable[[dict[str, torch.Tensor]], None], words: str) -> None:
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SourceError, match=f"(?s)^Source 'local-dir:.*{words}"):
        load_source(f"local-dir:{folder}")


def test_file_that_is_no_safetensors_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(SourceError, match=r"could not load .*model.safetensors into 'test_resnet'"):
        load_source(f"local-dir:{folder}")


def test_pretrained_classifier_cannot_be_resized(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"weights have 5 classes; arguments ask for 7"):
        find_source(SourceSpec(f"local-dir:{folder}", arguments={"num_classes": 7}))


# Hub


@pytest.mark.parametrize("at", ["", "@main"])
def test_hub_source_is_pinned_and_stays_usable_offline(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    hub.publish("org/mine", folder)
    spec = f"hf-hub:org/mine{at}"
    find_source(SourceSpec(spec))
    assert not any("GET" in request and "safetensors" in request for request in hub.requests)
    source = load_source(spec)
    assert_same_weights(source.module, load_file(folder / "model.safetensors"))
    assert (source.name, source.licence) == ("mine", "mit")
    assert source.ref.spec == spec
    assert source.ref.revision == hub.commit("org/mine")
    assert shapes(build_architecture(source.ref)) == shapes(source.module)

    assert load_source(f"hf-hub:org/mine@{source.ref.revision}").ref.weight_hash == source.ref.weight_hash
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_source(spec).ref == source.ref


def test_timm_name_downloads_through_the_hub_and_is_pinned(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = donor("test_resnet")
    timm.models.save_for_hf(model, str(tmp_path / "published"), safe_serialization="both")
    hub.publish("timm/test_resnet.r160_in1k", tmp_path / "published")
    source = load_source("test_resnet")
    assert_same_weights(source.module, model.state_dict())
    assert source.ref.revision == hub.commit("timm/test_resnet.r160_in1k")
    assert not any("pytorch_model.bin" in request for request in hub.requests)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_source("test_resnet").ref == source.ref


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf-hub:org/none", "no repository 'org/none' that you may see"),
        ("hf-hub:org/mine@v2", "'org/mine' has no revision 'v2'"),
        ("hf-hub:org/pickled", "'org/pickled' has no file model.safetensors.*pickled weights are never read"),
        ("hf-hub:org/bare", "'org/bare' has no file config.json"),
        ("hf-hub:org/bad name", "no name of a hub repository"),
        ("test_resnet", "no repository 'timm/test_resnet.r160_in1k'"),
    ],
)
def test_what_the_hub_does_not_have(hub: HubDouble, folder: Path, spec: str, words: str) -> None:
    hub.publish("org/mine", folder)
    hub.put("org/pickled", {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b""})
    hub.put("org/bare", {"model.safetensors": (folder / "model.safetensors").read_bytes()})
    with pytest.raises(SourceError, match=f"(?s)^Source '{spec}': .*{words}"):
        find_source(SourceSpec(spec))


def test_cached_hub_source_survives_a_dead_hub(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("org/mine", folder)
    ref = load_source("hf-hub:org/mine").ref
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert load_source("hf-hub:org/mine").ref == ref


NOWHERE = ["test_resnet", "hf-hub:org/mine@v1", "torchvision:squeezenet1_1", "legacy_seresnet18"]


def test_offline_fails_at_once_and_names_every_missing_file(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(SourceError, match=r"^4 of 4 sources cannot be had") as failure:
        load_sources(NOWHERE)
    parts = [
        "model.safetensors of hub repository 'timm/test_resnet.r160_in1k' (revision 'main') is not in the local cache, "
        "and HF_HUB_OFFLINE is set",
        "config.json of hub repository 'org/mine' (revision 'v1') is not in the local cache, and HF_HUB_OFFLINE is set",
        "`HF_HUB_OFFLINE=0 hf download timm/test_resnet.r160_in1k model.safetensors`",
        "`HF_HUB_OFFLINE=0 hf download org/mine config.json model.safetensors --revision v1`",
        str(tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"),
        str(tmp_path / "checkpoints" / "seresnet18-4bb0ce65.pth"),
    ]
    assert [part for part in parts if part not in str(failure.value)] == []
    assert hub.requests == []


DEAD_HUB = f"""
import json, sys, time
from lightning_stitch.errors import SourceError
from lightning_stitch.sources import load_sources
lazy = not {{"timm", "torchvision", "huggingface_hub"}} & set(sys.modules)
import timm
start = time.monotonic()
try:
    load_sources({NOWHERE[:2]})
except SourceError as error:
    print(json.dumps([lazy, time.monotonic() - start, str(error)]))
"""


def test_dead_hub_fails_at_once_and_importing_sources_imports_no_library_of_models(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", DEAD_HUB],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=True,
    )
    lazy, seconds, message = json.loads(run.stdout)
    assert lazy
    assert message.startswith("2 of 2 sources cannot be had")
    assert "model.safetensors of hub repository 'timm/test_resnet.r160_in1k' (revision 'main')" in message
    assert "config.json of hub repository 'org/mine' (revision 'v1')" in message
    assert message.count("and the hub cannot be reached (ConnectError: ") == 2
    # the client by itself would retry for 24 seconds, timm for 49
    assert seconds < 15


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
MISTAKEN = [
    (POINTER, "is a Git LFS pointer, .* `git lfs pull`"),
    (b"# xet version 0\nfilesize = 1\n", "is a Xet pointer"),
    (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "is a web page .*download the file from its own address"),
    (b"\xef\xbb\xbf\n <html lang='en'>", "is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    (b"", "is empty: its download broke off"),
]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(("content", "words"), MISTAKEN)
def test_what_a_download_left_in_place_of_a_file_is_called_that(
    folder: Path, name: str, content: bytes, words: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"(?s){name} {words}"):
        load_source(f"local-dir:{folder}")
    if name == "model.safetensors":
        assert load_source(f"local-dir:{folder}", pretrained=False).name == folder.name


def test_a_page_in_the_cache_of_weights_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(models.ResNet18_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"<html>")
    with pytest.raises(SourceError, match="is a web page"):
        load_source("torchvision:resnet18")
