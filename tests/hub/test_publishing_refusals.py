"""What publishing has to keep to itself, leave to others, and refuse before a repository is made."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
import torch
from doubles.hub import TOKEN, Fault, HubDouble, reply
from doubles.hub_server import point_client_at
from doubles.predictions import classifier
from huggingface_hub import ModelCard
from torch import nn

from lightning_stitch import CardDetails, StitchedClassifier, StitchError, publish

# The hub's client says this of itself, with newer versions of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/digits"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def model() -> StitchedClassifier:
    return classifier().eval()


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f" {TOKEN}\r\n"])
def test_the_space_around_a_token_from_a_file_is_left_out(
    token: str, hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_client_at(hub, monkeypatch, str(tmp_path / "cache"), None)
    assert publish(model, REPO, token=token).commit == hub.commit(REPO)


@pytest.mark.parametrize("token", ["hf_SE\nCRET", "hf_SECRET\u00e9", "hf SECRET", "hf_SECRET\0"], ids=ascii)
def test_a_token_that_is_none_is_refused_and_not_shown(token: str, hub: HubDouble, model: StitchedClassifier) -> None:
    with pytest.raises(StitchError, match="holds characters that no token has") as caught:
        publish(model, REPO, token=token)
    assert "CRET" not in "".join(traceback.format_exception(caught.value))
    assert hub.requests == []


def test_a_token_from_the_environment_is_looked_at_as_well(
    hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_client_at(hub, monkeypatch, str(tmp_path / "cache"), "hf_SECRET\u00e9")
    with pytest.raises(StitchError, match="holds characters that no token has"):
        publish(model, REPO)


def test_an_answer_that_tells_the_token_is_not_shown(
    hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = reply({"error": f"no such token: {TOKEN}"}, 403, {"X-Error-Message": f"no such token: {TOKEN}"})
    monkeypatch.setattr(hub, "answer", lambda *request: told)
    with pytest.raises(StitchError, match=r"status 403.*with the token in it") as caught:
        publish(model, REPO)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def made_meanwhile(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have somebody else make the repository while the network is saved."""
    save = StitchedClassifier.save_pretrained

    def meanwhile(self: StitchedClassifier, *arguments: object, **options: object) -> None:
        save(self, *arguments, **options)
        hub.put(REPO, {"README.md": b"theirs", "model.safetensors": b"theirs"})

    monkeypatch.setattr(StitchedClassifier, "save_pretrained", meanwhile)


def test_a_repository_that_somebody_made_in_the_meantime_stays_as_it_is(
    hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_meanwhile(hub, monkeypatch)
    with pytest.raises(StitchError, match=r"'me/digits' already has a README\.md"):
        publish(model, REPO)
    assert hub.files(REPO) == {"README.md": b"theirs", "model.safetensors": b"theirs"}


@pytest.mark.parametrize(("existing_card", "kept"), [("keep", True), ("replace", False)])
def test_the_card_of_the_meantime_is_treated_as_was_asked_for(
    existing_card: str, kept: bool, hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_meanwhile(hub, monkeypatch)
    publish(model, REPO, existing_card=existing_card)
    assert (hub.files(REPO)["README.md"] == b"theirs") is kept
    assert hub.files(REPO)["model.safetensors"] != b"theirs"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("POST", "/validate-yaml", status=400), r"refused to take the metadata of README\.md: .*on purpose"),
        (Fault("POST", "/validate-yaml", status=403, times=9), r"take the metadata of README\.md \(status 403\)"),
        (Fault("POST", "/validate-yaml", status=500, times=9), r"take the metadata of README\.md \(status 500\)"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Fault) else "",
)
def test_a_card_that_the_hub_refuses_is_an_error_before_a_repository_is_made(
    fault: Fault, words: str, hub: HubDouble, model: StitchedClassifier
) -> None:
    hub.faults = [Fault(**vars(fault))]
    with pytest.raises(StitchError, match=words):
        publish(model, REPO)
    assert not hub.repos


def test_a_licence_in_words_of_ones_own_is_taken_by_the_hub(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO, details=CardDetails(licence="My own, ask me first"))
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (data.license, data.license_name) == ("other", "my-own-ask-me-first")


def test_a_compiled_network_is_published_as_it_is_without(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(torch.compile(model), REPO)
    assert json.loads(hub.files(REPO)["config.json"])["lightning_stitch"]["kind"] == "classifier"


def test_a_network_spread_over_devices_is_refused_with_what_to_give(hub: HubDouble, model: StitchedClassifier) -> None:
    with pytest.raises(StitchError, match=r"DataParallel has no recipe.*of a wrapper its \.module"):
        publish(nn.DataParallel(model), REPO)
    assert hub.requests == []
