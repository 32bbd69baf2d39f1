from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from doubles.published_networks import IMAGES, NAMES, classifier, network, outputs
from timm.models._registry import _deprecated_models

import lightning_stitch.timm  # noqa: F401 (timm then knows the architecture)
from lightning_stitch import SourceError, load_source
from lightning_stitch.sources.timm_models import current_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "classifier"
    classifier().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("first", ["timm", "lightning_stitch"])
def test_timm_knows_saved_networks_whichever_is_imported_first(first: str, folder: Path) -> None:
    second = {"timm": "lightning_stitch", "lightning_stitch": "timm"}[first]
    script = f"""
import {first}
import {second}
import lightning_stitch.timm
print(timm.create_model("local-dir:{folder}", pretrained=True).num_classes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(len(NAMES)), "")


def test_timm_gives_the_saved_outputs_for_images_as_its_own_transform_makes_them(folder: Path) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(outputs(loaded), outputs(classifier()))
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["input_size"], config["mean"], config["std"]) == ([3, 32, 32], [0.0] * 3, [1.0] * 3)
    assert loaded.pretrained_cfg["label_names"] == loaded.class_names == NAMES


def test_timm_gives_features_and_new_heads(folder: Path) -> None:
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.equal(outputs(features), outputs(network()))
    wider = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert outputs(wider).shape == (len(IMAGES), 7)
    assert torch.equal(wider.forward_head(wider.forward_features(IMAGES), pre_logits=True), outputs(network()))


def test_timm_without_weights_gives_the_structure_alone(folder: Path) -> None:
    plain = timm.create_model(f"local-dir:{folder}", pretrained=False)
    saved = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in saved.state_dict().items()}
    assert not torch.equal(outputs(plain.eval()), outputs(saved.eval()))


def test_the_number_of_classes_is_the_heads_whatever_the_config_says(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10).eval()
    assert outputs(loaded).shape == (len(IMAGES), 10)


def test_what_would_change_its_structure_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="cannot change features_only of it"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    with pytest.raises(SourceError, match="is not built by name"):
        timm.create_model("lightning_stitch", pretrained=True)


def test_a_saved_network_is_no_source_of_another_search(folder: Path) -> None:
    with pytest.raises(SourceError, match="cannot be a source of another search"):
        load_source(f"local-dir:{folder}")


@pytest.mark.parametrize("old", sorted(_deprecated_models))
def test_every_name_that_timm_has_renamed_is_its_own_replacement(old: str) -> None:
    with pytest.warns(UserWarning, match=f"^Mapping deprecated model name {old} to current {_deprecated_models[old]}"):
        assert timm.is_model(current := current_name(old))
    assert current == _deprecated_models[old]


def test_an_old_name_is_built_as_the_new_one_with_timms_warning() -> None:
    with pytest.warns(UserWarning, match=r"^Mapping deprecated model name ssl_resnet18 to current resnet18.fb_ssl"):
        source = load_source("ssl_resnet18", pretrained=False)
    assert source.ref.architecture == "resnet18.fb_ssl_yfcc100m_ft_in1k"
    with pytest.warns(UserWarning, match="gluon_resnet18_v1b"):
        assert current_name("gluon_resnet18_v1b.mine") == "resnet18.mine"
    assert current_name("resnet18.a1_in1k") == "resnet18.a1_in1k"


def test_a_folder_may_have_an_old_name_and_a_removed_one_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "older"
    timm.models.save_for_hf(timm.create_model("resnet18"), str(path), safe_serialization=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architecture": "swsl_resnet18"}))
    with pytest.warns(UserWarning, match="Mapping deprecated model name swsl_resnet18"):
        assert load_source(f"local-dir:{path}").ref.architecture == "resnet18"
    monkeypatch.setitem(_deprecated_models, "gone_net", None)
    with pytest.raises(SourceError, match="timm has removed the model 'gone_net', with no replacement"):
        load_source("gone_net")
