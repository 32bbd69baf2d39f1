from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from doubles.hub import HubDouble
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_stitch import CalibrationSettings, Preflight, SourceError, load_source, load_sources, preflight
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.preflight_table import preflight_text, require
from lightning_stitch.stitching.segments import segment

RANDOM = {"spec": "test_resnet", "pretrained": False}


def problems(checked: Preflight) -> list[str]:
    return [row.problem or "" for row in checked.rows]


def damaged(folder: Path, copy: Path, name: str) -> Path:
    """A copy of a folder whose weights lack one tensor and have one of another shape."""
    shutil.copytree(folder, copy / name)
    weights = load_file(folder / "model.safetensors")
    weights["fc.bias"] = torch.zeros(9)
    del weights["fc.weight"]
    save_file(weights, copy / name / "model.safetensors")
    return copy / name


class OwnNetwork(nn.Sequential):
    input_size, mean, std = (3, 32, 32), (0.5,) * 3, (0.5,) * 3
    calls = 0

    def __init__(self) -> None:
        type(self).calls += 1
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 28 * 28, 6))


class SideBySide(nn.Module):
    input_size, mean, std = (3, 32, 32), (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x).relu().mean((2, 3)) + self.right(x).relu().mean((2, 3))


# What fits


@pytest.mark.parametrize(
    ("spec", "image_shape", "until"),
    [
        ("test_resnet", (3, 64, 64), "features"),
        ("test_vit", (3, 64, 64), "features"),
        ("test_efficientnet", None, "output"),
        ("torchvision:squeezenet1_1", (3, 96, 64), "output"),
    ],
)
def test_what_is_said_of_a_source_is_what_the_search_will_find(
    spec: str, image_shape: tuple[int, int, int] | None, until: str
) -> None:
    settings = CalibrationSettings(until=until, granularity="stages")
    given = {"spec": spec, "pretrained": False}
    (row,) = preflight([given], image_shape=image_shape, settings=settings).rows
    source = load_source(**given)
    parts = segment(source, settings, image_shape or source.preprocessing.input_size)
    assert row.fits
    assert row.formats == Counter(cut.format for cut in parts.cuts)
    assert row.macs == parts.cost.macs
    assert row.view_size == parts.graph.input_size
    assert row.params == sum(parameter.numel() for parameter in source.module.parameters())
    assert (row.name, row.input_size, row.licence) == (source.name, source.preprocessing.input_size, source.licence)
    assert (row.architecture, row.download) == (source.ref.architecture, 0)


def test_a_live_module_is_checked_and_left_as_it_was() -> None:
    module = OwnNetwork().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    checked = preflight([{"spec": module, "name": "mine"}])
    assert checked.fits
    assert checked.rows[0].params == sum(parameter.numel() for parameter in module.parameters())
    assert module.training
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_a_factory_is_not_called_because_it_may_fetch_weights() -> None:
    OwnNetwork.calls = 0
    checked = preflight([f"python:{__name__}:OwnNetwork"])
    assert (checked.fits, OwnNetwork.calls) == (True, 0)
    assert "the factory is not called yet" in checked.rows[0].notes[-1]


def test_names_are_those_that_load_sources_gives() -> None:
    sources = [RANDOM, {**RANDOM, "name": "other"}, RANDOM]
    assert [row.name for row in preflight(sources).rows] == [source.name for source in load_sources(sources)]


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        (None, ("its licence is unknown",)),
        ("apache-2.0", ()),
        ("cc-by-nc-4.0", ("its licence (cc-by-nc-4.0) forbids commercial use",)),
        ("cc-by-nc-nd-4.0", ("its licence (cc-by-nc-nd-4.0) forbids derivatives and commercial use",)),
    ],
)
def test_a_licence_that_matters_is_noted_and_rejects_nothing(licence: str | None, words: tuple[str, ...]) -> None:
    checked = preflight([{"spec": OwnNetwork(), "name": "mine", "licence": licence}])
    assert checked.fits
    assert checked.rows[0].notes == words
    assert all(note in preflight_text(checked) for note in words)


# The hub


def test_what_is_to_be_downloaded_is_known_and_nothing_is_before_it_is_loaded(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    hub.publish("org/mine", folder)
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "its"), safe_serialization=True)
    hub.publish("timm/test_resnet.r160_in1k", tmp_path / "its")
    sources = ["hf-hub:org/mine", "test_resnet", f"local-dir:{folder}", "hf-hub:org/mine@main"]
    sizes = [len(hub.files(repo)["model.safetensors"]) for repo in ("org/mine", "timm/test_resnet.r160_in1k")]

    checked = preflight(sources, image_shape=(3, 64, 64))
    assert checked.fits, preflight_text(checked)
    assert hub.downloads("model.safetensors") == 0
    assert [row.download for row in checked.rows] == [sizes[0], sizes[1], 0, sizes[0]]
    assert [row.revision for row in checked.rows[:3]] == [
        hub.commit("org/mine"),
        hub.commit("timm/test_resnet.r160_in1k"),
        None,
    ]
    (disk,) = checked.disks
    assert disk.download == sum(sizes)  # one file is wanted twice
    assert disk.free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)

    loaded = load_sources(sources)
    assert hub.downloads("model.safetensors") == 2
    again = preflight(sources)
    assert [row.download for row in again.rows] == [0, 0, 0, 0]
    assert again.disks == ()
    assert [row.revision for row in again.rows] == [source.ref.revision for source in loaded]


def test_a_download_shows_its_progress(
    hub: HubDouble, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client's way to have its bars where there is no terminal
    hub.publish("org/mine", folder)
    load_source("hf-hub:org/mine")
    shown = capfd.readouterr().err
    assert "model.safetensors" in shown
    assert "100%" in shown


def test_too_little_room_is_told_before_the_download(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/mine", folder)
    size = len(hub.files("org/mine")["model.safetensors"])
    for free, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        checked = preflight(["hf-hub:org/mine"])
        assert checked.fits == fits
    assert f"need {size / 1e6:.2f} MB more" in checked.problems[0]
    assert (
        f"where {size / 1e6:.2f} MB are free. Free 0.01 MB, take fewer sources, or let HF_HOME" in checked.problems[0]
    )
    with pytest.raises(SourceError, match=r"cannot be used together. No weights were downloaded.\n"):
        require(checked, skip_rejected=True)
    assert hub.downloads("model.safetensors") == 0


def test_without_a_network_the_cache_is_checked_and_the_table_says_so(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/mine", folder)
    load_source("hf-hub:org/mine")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checked = preflight(["hf-hub:org/mine", "test_vit", "hf-hub:org/other@v1"])
    assert len(hub.requests) == asked
    assert [row.fits for row in checked.rows] == [True, False, False]
    assert checked.notes == ("HF_HUB_OFFLINE is set: for 1 of 3 sources the cache was taken.",)
    cached, unfetched, unknown = checked.rows
    assert cached.revision == hub.commit("org/mine")
    assert "`HF_HUB_OFFLINE=0 hf download timm/test_vit.r160_in1k model.safetensors`" in str(unfetched.problem)
    assert "`HF_HUB_OFFLINE=0 hf download org/other config.json model.safetensors --revision v1`" in str(
        unknown.problem
    )


def test_a_dead_hub_is_told_with_what_the_cache_holds(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/mine", folder)
    load_source("hf-hub:org/mine")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    checked = preflight(["hf-hub:org/mine", "test_vit"])
    assert [row.fits for row in checked.rows] == [True, False]
    assert checked.notes[0].startswith("the hub cannot be reached (ConnectError: ")
    assert "`hf download timm/test_vit.r160_in1k model.safetensors`" in str(checked.rows[1].problem)


def test_weights_from_elsewhere_are_asked_for_their_size(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    hub.put("org/files", {"weights.pth": bytes(1234)})
    for name, download, problem in (("weights.pth", 1234, ""), ("none.pth", None, "cannot be reached (HTTPError: ")):
        url = f"{hub.url}/org/files/resolve/main/{name}"
        entry = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
        monkeypatch.setattr(
            SqueezeNet1_1_Weights.IMAGENET1K_V1, "_value_", type(entry)(url, entry.transforms, entry.meta)
        )
        (row,) = preflight(["torchvision:squeezenet1_1"]).rows
        assert row.download == download
        assert problem in (row.problem or "")
        assert row.fits == (not problem)
    assert not any(request.startswith("GET") for request in hub.requests)


# What does not


@pytest.mark.parametrize("where", ["local-dir:", "hf-hub:"])
def test_weights_that_do_not_fit_are_rejected_by_names_and_shapes_alone(
    hub: HubDouble, folder: Path, tmp_path: Path, where: str
) -> None:
    broken = damaged(folder, tmp_path, "broken")
    hub.publish("org/broken", broken)
    (row,) = preflight([where + ("org/broken" if where == "hf-hub:" else str(broken))]).rows
    assert not row.fits
    assert 'Missing key(s) in state_dict: "fc.weight"' in str(row.problem)
    assert "size mismatch for fc.bias" in str(row.problem)
    assert hub.downloads("model.safetensors") == 0


def test_a_file_that_is_no_safetensors_file_is_rejected(hub: HubDouble, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    hub.publish("org/pointer", folder)
    assert "is a Git LFS pointer" in problems(preflight([f"local-dir:{folder}"]))[0]
    assert "is no safetensors file, or damaged" in problems(preflight(["hf-hub:org/pointer"]))[0]


def test_every_source_that_cannot_be_used_is_reported_beside_those_that_can(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    hub.publish("org/mine", folder)
    grey = Preprocessing((1, 32, 32), (0.5,), (0.5,))
    sources: list[Any] = [
        "test_resnt",
        "hf-hub:org/mine",
        "hf-hub:org/none",
        f"local-dir:{tmp_path / 'nowhere'}",
        {"spec": "test_resnet", "pretrained": False, "arguments": {"in_chans": 1}, "preprocessing": grey},
        {"spec": "test_resnet", "pretrained": False, "strange": 1},
        {"spec": SideBySide(), "name": "branches"},
    ]
    checked = preflight(sources, image_shape=(3, 64, 64))
    expected = [
        "knows no model 'test_resnt'. Nearest: 'test_resnet'",
        "",
        "no repository 'org/none' that you may see",
        "there is no folder",
        "takes images of 1 channels; the calibration images have 3",
        "may hold",
        "no place where exactly one activation",
    ]
    for found, words in zip(problems(checked), expected, strict=True):
        assert words in found
        assert bool(words) == bool(found)
    text = preflight_text(checked)
    assert text.startswith("1 of 7 sources fit, for images of 3x64x64")
    assert [row.name in text for row in checked.rows] == [True] * 7
    assert hub.downloads("model.safetensors") == 0
    with pytest.raises(
        SourceError, match=r"^6 of 7 sources cannot be used. No weights were downloaded.\n1 of 7"
    ) as told:
        require(checked)
    assert str(told.value).endswith("skip_rejected=True goes on without those that are rejected.")
    require(checked, skip_rejected=True)


@pytest.mark.parametrize(
    ("sources", "settings", "words"),
    [
        (["test_resnt"], {}, "No source is left"),
        ([RANDOM], {"granularity": {"other": "all"}}, r"granularity= names ['other']"),
        ([RANDOM, {**RANDOM, "arguments": {"num_classes": 4}}], {"until": "output"}, "outputs of one width"),
    ],
)
def test_what_stands_against_all_of_them_is_no_single_sources_fault(
    sources: list[Any], settings: dict[str, Any], words: str
) -> None:
    checked = preflight(sources, settings=CalibrationSettings(**settings))
    assert words in " ".join(checked.problems)
    assert not checked.fits


@pytest.mark.parametrize("sources", [[], "test_resnet", RANDOM])
def test_what_is_no_list_of_sources(sources: Any) -> None:
    with pytest.raises(SourceError, match="Expected a list of sources"):
        preflight(sources)


def test_the_result_is_plain_json() -> None:
    checked = preflight([RANDOM, "test_resnt"], image_shape=(3, 64, 64))
    told = json.loads(json.dumps(checked.to_dict()))
    assert (told["fits"], [row["fits"] for row in told["rows"]]) == (False, [True, False])
    assert told["rows"][0]["formats"] == checked.rows[0].formats
    assert told["image_shape"] == [3, 64, 64]
