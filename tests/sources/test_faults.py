"""Sources that are written wrong, hubs that keep silent, caches that cannot be written, and what is said of each."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doubles.hub import Fault, HubDouble
from huggingface_hub import constants
from rich.console import Console

from lightning_stitch import CalibrationSettings, Pool, SourceError, StitchError, load_source, load_sources, preflight
from lightning_stitch.io.hub_download import hub_file
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.preflight_table import preflight_text, print_preflight

RANDOM = {"spec": "test_resnet", "pretrained": False}
MEANS = {"mean": [0.5] * 3, "std": [0.5] * 3}


# Written wrong


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"arguments": [1]}, r"arguments must map the names .* found \[1\]"),
        ({"preprocessing": {"input_size": 5, **MEANS}}, "found input_size=5"),
        ({"preprocessing": {"input_size": [3, 32, 32], **MEANS, "mean": 0.5}}, "mean=0.5"),
        ({"preprocessing": {"input_size": [3, "a", 32], **MEANS}}, r"found input_size=\(3, 'a', 32\)"),
        ({"preprocessing": {"input_size": [3, 32, 32], **MEANS, "interpolation": 3}}, "interpolation=3"),
        ({"preprocessing": [1, 2]}, r"preprocessing must be a mapping .* found \[1, 2\]"),
        ({"name": 5}, "name must be text; found 5"),
        ({"licence": ["mit", "gpl"]}, r"its licence should be one word, .* found \['mit', 'gpl'\]"),
        ({"pretrained": "no"}, "pretrained must be true or false; found 'no'"),
        ({"arguments": {"img_size": {}}}, "preprocessing cannot be read"),
        ({"spec": ["test_resnet"]}, "expected a timm name"),
    ],
)
def test_a_source_that_is_written_wrong_is_rejected_beside_the_others(given: dict[str, Any], words: str) -> None:
    sources: list[Any] = [{**RANDOM, **given}, "test_resnt", RANDOM]
    checked = preflight(sources)
    assert [row.fits for row in checked.rows] == [False, False, True]
    with pytest.raises(SourceError, match=rf"(?s)^2 of 3 sources cannot be had; nothing was loaded\.\n- .*{words}"):
        load_sources(sources)
    assert re.search(words, str(checked.rows[0].problem))


@pytest.mark.parametrize("code", ["def f(:", "raise RuntimeError('on purpose')", "1 / 0"])
def test_a_factory_whose_module_fails_is_rejected_beside_the_others(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_factories.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    broken, other = preflight(["python:broken_factories:make", RANDOM]).rows
    assert "'broken_factories:make' cannot be imported: broken_factories raises " in str(broken.problem)
    assert other.fits


def test_a_licence_of_a_strangers_config_that_is_no_word_is_refused_unless_one_is_given(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = ["mit"]
    (folder / "config.json").write_text(json.dumps(config))
    spec = f"local-dir:{folder}"
    assert "its licence should be one word" in str(preflight([spec]).rows[0].problem)
    with pytest.raises(SourceError, match=r"found \['mit'\]\. Give licence='\.\.\.'"):
        load_source(spec)
    assert load_source(spec, licence="mit").licence == "mit"


def test_a_word_for_cuts_that_has_no_meaning_is_refused_before_a_source_is_looked_for() -> None:
    with pytest.raises(StitchError, match=r"granularity must be one of \('stages', .*; found 'stagez'"):
        CalibrationSettings(granularity="stagez")


def test_another_default_dtype_is_refused_in_words() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        told = preflight([RANDOM], image_shape=(3, 64, 64)).rows[0].problem
    finally:
        torch.set_default_dtype(torch.float32)
    assert "torch's default dtype is torch.float64. Call torch.set_default_dtype(torch.float32)" in str(told)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(StitchError, match=r"The name of a source 'caf\\udce9' is no text"):
        Pool([load_source(**RANDOM, name="caf\udce9")], (3, 64, 64))


def test_a_cut_that_does_not_exist_is_no_matter_of_size() -> None:
    settings = CalibrationSettings(granularity=["no.such.cut"])
    checked = preflight([RANDOM], image_shape=(3, 64, 64), settings=settings)
    assert not checked.fits
    assert "native" not in preflight_text(checked)


def test_random_weights_need_no_download_even_where_they_are_rejected() -> None:
    grey = {**RANDOM, "arguments": {"in_chans": 1}, "preprocessing": Preprocessing((1, 32, 32), (0.5,), (0.5,))}
    (row,) = preflight([grey], image_shape=(3, 64, 64)).rows
    assert (row.fits, row.download) == (False, 0)


def test_a_short_hash_is_told_to_be_too_short(hub: HubDouble, folder: Path) -> None:
    hub.publish("org/mine", folder)
    with pytest.raises(SourceError, match=r"has no revision '1d7097c'\. A commit is given by all 40 digits"):
        load_source("hf-hub:org/mine@1d7097c")
    with pytest.raises(SourceError, match=r"has no revision 'v1'\.$"):
        load_source("hf-hub:org/mine@v1")


# Hubs


@contextmanager
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """A hub that takes questions and never answers; gives the questions that it got."""
    questions: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):  # the end of the server
                while True:
                    questions.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield questions
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for question in questions:
        question.close()


def test_a_silent_hub_is_waited_for_once_by_each_question(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/first", folder)
    load_source("hf-hub:org/first")
    with silent_hub(monkeypatch) as questions:
        checked = preflight(["hf-hub:org/first", "hf-hub:org/none"])
        assert len(questions) == 3  # for config and weights of the first; for the config of the other
        assert load_source("hf-hub:org/first").name == "first"
    assert [row.fits for row in checked.rows] == [True, False]
    assert "not in the local cache, and the hub cannot be reached (ReadTimeout" in str(checked.rows[1].problem)
    assert len(checked.notes) == 1
    assert checked.notes[0].endswith("for 1 of 2 sources the cache was taken.")


def test_a_hub_that_is_mended_is_asked_again_at_once(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/first", folder)
    with silent_hub(monkeypatch):
        assert not preflight(["hf-hub:org/first"]).fits
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    assert preflight(["hf-hub:org/first"]).fits


def test_weights_whose_header_the_hub_does_not_give_are_noted(hub: HubDouble, folder: Path) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault("GET", "model.safetensors", status=503, times=99)]
    checked = preflight(["hf-hub:org/mine"])
    assert checked.fits
    assert "mine: its weights' shapes could not be read yet" in preflight_text(checked)


def test_a_cache_is_not_told_of_where_it_was_not_taken(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    entry = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    missing = type(entry)(f"{hub.url}/org/files/resolve/main/none.pth", entry.transforms, entry.meta)
    monkeypatch.setattr(SqueezeNet1_1_Weights.IMAGENET1K_V1, "_value_", missing)
    checked = preflight(["torchvision:squeezenet1_1", RANDOM])
    assert [row.fits for row in checked.rows] == [False, True]
    assert checked.notes == ()


# Files


def test_a_file_that_is_too_large_is_not_downloaded(hub: HubDouble, folder: Path) -> None:
    hub.publish("org/mine", folder)
    size = len(hub.files("org/mine")["config.json"])
    with pytest.raises(SourceError, match=rf"^config\.json of .* has {size} bytes; expected were {size - 1} at most"):
        hub_file("org/mine", "config.json", most=size - 1)
    assert hub.downloads("config.json") == 0
    assert hub_file("org/mine", "config.json", most=size).stat().st_size == size


def test_a_config_that_is_too_large_is_not_downloaded(hub: HubDouble, folder: Path) -> None:
    (folder / "config.json").write_bytes(b" " * (16 * 2**20 + 1))
    hub.publish("org/mine", folder)
    assert "expected were 16777216 at most" in str(preflight(["hf-hub:org/mine"]).rows[0].problem)
    assert hub.downloads("config.json") == 0


def test_a_cache_that_is_no_folder_is_told(
    hub: HubDouble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(folder), safe_serialization=True)
    hub.publish("timm/test_resnet.r160_in1k", folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(
        SourceError, match=r"could not be downloaded: .*room and rights in the cache .*file/hub \(HF_HOME"
    ):
        hub_file("timm/test_resnet.r160_in1k", "model.safetensors")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_named(
    number: int, hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/mine", folder)

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, "on purpose")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(SourceError, match=r"could not be downloaded: .*on purpose.*room and rights in the cache"):
        hub_file("org/mine", "model.safetensors")


# The table


def test_names_are_whole_in_a_pipe_and_no_line_ends_in_blanks() -> None:
    name = "a_network_with_a_long_name." + "and_tag" * 12
    text = StringIO()
    checked = preflight([{**RANDOM, "name": name, "licence": "cc-by-nc-sa-4.0"}])
    print_preflight(checked, console=Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert sum(line.startswith(f"{name}  yes") for line in lines) == 1
    assert text.getvalue().rstrip() == preflight_text(checked)


@pytest.mark.parametrize(("width", "columns"), [(120, 8), (80, 6), (60, 4)])
def test_a_narrow_terminal_is_spared_columns_not_names(width: int, columns: int) -> None:
    text = StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    print_preflight(preflight([{**RANDOM, "name": "mobilenetv3_100.lamb_in1k"}]), console=console)
    title, head, row = text.getvalue().splitlines()[:3]
    assert title.startswith("1 of 1 sources fit")
    assert len(re.split(" {2,}", head.strip())) == columns
    assert row.startswith("mobilenetv3_100.lamb_in1k  yes")
    assert max(len(head), len(row)) <= width
