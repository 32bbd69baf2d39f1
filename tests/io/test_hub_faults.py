"""Sources pulled with the hub's real client from a hub that fails on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.hub import Fault, HubDouble
from doubles.hub_server import point_client_at
from doubles.small_sources import assert_same_weights
from safetensors.torch import load_file

from lightning_stitch import SourceError, load_source

SPEC, FILE = "hf-hub:org/mine", "/resolve/.*/model.safetensors"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


@pytest.mark.parametrize(
    "fault",
    [
        Fault("HEAD", FILE, status=500, times=2),
        Fault("HEAD", FILE, status=429, headers={"Retry-After": "7"}),
        Fault("HEAD", "config.json", status=503),
        Fault("GET", FILE, status=500),
        Fault("GET", FILE, status=429, headers={"Retry-After": "7"}),
        Fault("GET", FILE, cut=True),
    ],
    ids=lambda fault: f"{fault.method}-{fault.status or 'cut'}-{fault.times}",
)
@pytest.mark.filterwarnings("ignore:The hub repository 'org/mine' did not answer:UserWarning")
def test_a_fault_that_passes_is_waited_for(fault: Fault, hub: HubDouble, folder: Path, waited: list[float]) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault(**vars(fault))]
    source = load_source(SPEC)
    assert hub.faults[0].times == 0
    assert_same_weights(source.module, load_file(folder / "model.safetensors"))
    if fault.headers:
        # the client itself adds a second
        assert {7, 8} & {round(seconds) for seconds in waited}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("HEAD", "resolve", status=500, times=99), "not in the local cache, and the hub cannot be reached .*500"),
        (Fault("GET", FILE, status=500, times=99), r"model\.safetensors .* could not be downloaded: .*500"),
        (
            Fault("HEAD", "resolve", status=401, times=99),
            r"the hub refuses your token \(status 401\)\. Log in with `hf auth",
        ),
        (Fault("HEAD", FILE, status=403, times=99), r"the hub refuses your token \(status 403\)"),
    ],
    ids=lambda value: f"{value.method}-{value.status}" if isinstance(value, Fault) else "",
)
@pytest.mark.filterwarnings("ignore:The hub repository 'org/mine' did not answer:UserWarning")
def test_a_fault_that_stays_is_an_error_and_what_is_mended_then_works(
    fault: Fault, words: str, hub: HubDouble, folder: Path, waited: list[float]
) -> None:
    hub.publish("org/mine", folder)
    hub.faults = [Fault(**vars(fault))]
    with pytest.raises(SourceError, match=f"(?s){words}"):
        load_source(SPEC)
    hub.faults = []
    assert_same_weights(load_source(SPEC).module, load_file(folder / "model.safetensors"))


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
