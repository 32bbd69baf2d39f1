"""Sources pulled with the hub's real client from a hub that fails on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.hub import Fault, HubDouble
from doubles.hub_server import point_client_at
from doubles.small_sources import assert_same_weights
from safetensors.torch import load_file

from lightning_stitch import SourceError, load_source
from lightning_stitch.io.hub_download import split_repository

SPEC, FILE = "hf-hub:org/mine", "/resolve/.*/model.safetensors"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.mark.parametrize(
    "fault",
    [
        Fault("HEAD", FILE, status=500, times=2),
        Fault("HEAD", FILE, status=429, times=2, headers={"Retry-After": "7"}),
        Fault("HEAD", "config.json", status=503, times=2),
        Fault("GET", FILE, status=429, headers={"Retry-After": "7"}),
        Fault("GET", FILE, cut=True),
    ],
    ids=lambda fault: f"{fault.method}-{fault.status or 'cut'}",
)
def test_a_fault_that_passes_is_waited_for_by_the_client(
    fault: Fault, hub: HubDouble, folder: Path, waited: list[float]
) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault(**vars(fault))]
    source = load_source(SPEC)
    assert hub.faults[0].times == 0
    assert_same_weights(source.module, load_file(folder / "model.safetensors"))
    if fault.headers:
        # as long as the hub asks for; the client adds a second
        assert 8 in waited


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("HEAD", "resolve", status=500, times=99), "not in the local cache, and the hub cannot be reached .*500"),
        (Fault("GET", FILE, status=500), r"model\.safetensors .* could not be downloaded: .*500"),
        (
            Fault("HEAD", "resolve", status=401, times=99),
            r"the hub refuses your token \(status 401\)\. Log in with `hf auth",
        ),
        (Fault("HEAD", FILE, status=403, times=99), r"the hub refuses your token \(status 403\)"),
    ],
    ids=lambda value: f"{value.method}-{value.status}" if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_is_an_error_and_what_is_mended_then_works(
    fault: Fault, words: str, hub: HubDouble, folder: Path, waited: list[float]
) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault(**vars(fault))]
    with pytest.raises(SourceError, match=f"(?s){words}"):
        load_source(SPEC)
    # a refusal is no matter of time
    assert not (waited and fault.status in (401, 403))
    hub.faults = []
    assert_same_weights(load_source(SPEC).module, load_file(folder / "model.safetensors"))


def test_a_busy_hub_is_not_waited_for_where_the_cache_has_the_file(
    hub: HubDouble, folder: Path, waited: list[float]
) -> None:
    hub.publish("org/mine", folder)
    load_source(SPEC)
    hub.faults = [Fault("HEAD", "resolve", status=503, times=99)]
    assert_same_weights(load_source(SPEC).module, load_file(folder / "model.safetensors"))
    assert waited == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("org/mine", ("org/mine", None)),
        ("org/mine@refs/pr/1", ("org/mine", "refs/pr/1")),
        ("org/mine@", None),
        ("mine", None),
        ("a/b/c", None),
        ("/mine", None),
    ],
)
def test_a_repository_and_its_revision_are_told_apart(words: str, parts: tuple[str, str | None] | None) -> None:
    assert split_repository(words) == parts


def test_other_bytes_than_the_hubs_are_refused_and_not_kept(hub: HubDouble, folder: Path) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault("GET", FILE, damage=True)]
    with pytest.raises(SourceError, match=r"model\.safetensors .* did not arrive as the hub has it"):
        load_source(SPEC)
    assert_same_weights(load_source(SPEC).module, load_file(folder / "model.safetensors"))


def test_public_repositories_need_no_token(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.publish("org/mine", folder)
    point_client_at(hub, monkeypatch, str(tmp_path / "mine"), token=None)
    assert load_source(SPEC).ref.revision == hub.commit("org/mine")
