from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doubles.hub import Fault, HubDouble
from doubles.hub_server import point_client_at
from doubles.predictions import classifier, small_source
from doubles.tensors import noise
from huggingface_hub import RepoCard, constants, snapshot_download

from lightning_stitch import (
    CardDetails,
    RecipeError,
    SourceError,
    StitchedClassifier,
    StitchError,
    load_source,
    publish,
)

# The hub's client says this of itself, with newer versions of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/digits"
FILES = {"README.md", "config.json", "model.safetensors", "composition.png"}
IMAGES = noise(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def model() -> StitchedClassifier:
    return classifier().eval()


def with_licence(licence: str | None) -> StitchedClassifier:
    return classifier(load_source("test_resnet", pretrained=False, licence=licence))


def outputs(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IMAGES)


def visible(hub: HubDouble) -> set[str]:
    """Files that a visitor of main sees, if the repository is there at all."""
    return set(hub.files(REPO)) - {".gitattributes"} if REPO in hub.repos else set()


def test_a_published_classifier_is_pulled_alike_by_its_commit(hub: HubDouble, model: StitchedClassifier) -> None:
    found = publish(model, REPO)
    assert found.url == f"{hub.url}/{REPO}"
    assert found.commit == hub.commit(REPO)
    assert visible(hub) == FILES
    assert hub.asked("POST", "/commit/") == 1
    pulled = StitchedClassifier.from_pretrained(f"hf-hub:{REPO}@{found.commit}")
    assert torch.equal(outputs(pulled), outputs(model))
    assert pulled.class_names == model.class_names
    # the card names what loads it
    assert f'StitchedClassifier.from_pretrained("{REPO}")'.encode() in hub.files(REPO)["README.md"]


def test_what_was_pulled_once_is_there_offline(
    hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(model, REPO)
    StitchedClassifier.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(REPO)), outputs(model))
    assert len(hub.requests) == asked
    with pytest.raises(StitchError, match="HF_HUB_OFFLINE is set, and publishing needs the hub"):
        publish(model, REPO)
    with pytest.raises(SourceError, match=r"config\.json of hub repository 'me/other'.*not in the local cache"):
        StitchedClassifier.from_pretrained("me/other")


@pytest.mark.parametrize("private", [True, False])
def test_visibility_is_that_asked_for_and_never_changed(
    private: bool, hub: HubDouble, model: StitchedClassifier
) -> None:
    publish(model, REPO, private=private)
    assert hub.repos[REPO].private is private
    with pytest.raises(StitchError, match=f"private={not private} asks for a"):
        publish(model, REPO, private=not private, existing_card="replace")


def test_a_branch_is_made_and_main_stays(hub: HubDouble, model: StitchedClassifier) -> None:
    found = publish(model, REPO, revision="next")
    assert visible(hub) == set()
    assert set(hub.files(REPO, "next")) - {".gitattributes"} == FILES
    assert hub.repos[REPO].branches["next"] == found.commit
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(f"{REPO}@next")), outputs(model))


def test_a_card_that_is_there_is_never_overwritten_untold(hub: HubDouble, model: StitchedClassifier) -> None:
    hub.put(REPO, {"README.md": b"mine", "notes.txt": b"kept"})
    with pytest.raises(StitchError, match=r"already has a README\.md.*existing_card='replace'"):
        publish(model, REPO)
    assert visible(hub) == {"README.md", "notes.txt"}
    publish(model, REPO, existing_card="keep")
    assert hub.files(REPO)["README.md"] == b"mine"
    assert visible(hub) == FILES | {"notes.txt"}
    publish(model, REPO, existing_card="replace")
    assert hub.files(REPO)["README.md"] != b"mine"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_credentials_are_checked_before_anything_is_made(
    token: str | None, hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_client_at(hub, monkeypatch, str(tmp_path / "cache"), token)
    monkeypatch.setattr(StitchedClassifier, "save_pretrained", None)
    with pytest.raises(StitchError, match="hf auth login"):
        publish(model, REPO)
    assert not hub.repos
    assert hub.asked("POST", "") == 0


@pytest.mark.parametrize(
    ("repo", "role", "words"),
    [
        ("stranger/digits", "write", "'stranger' is neither you nor an organisation of yours (lab, me)"),
        (REPO, "read", "Your token may only read."),
    ],
)
def test_what_one_may_not_write_is_refused_before_anything_is_saved(
    repo: str, role: str, words: str, hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = role
    monkeypatch.setattr(StitchedClassifier, "save_pretrained", None)
    with pytest.raises(StitchError, match=re.escape(words)):
        publish(model, repo)
    assert hub.asked("POST", "") == 0


@pytest.mark.parametrize(
    ("make", "repo", "kind", "words"),
    [
        (classifier, "digits", StitchError, "A repository is 'ORG/NAME'"),
        (classifier, "a b/c", StitchError, "'a b/c' is no name of a hub repository"),
        (lambda: StitchedClassifier(num_classes=2), REPO, StitchError, "has no recipe, so there is nothing to publish"),
        (lambda: torch.nn.Linear(2, 2), REPO, StitchError, "Linear has no recipe"),
        (lambda: classifier(small_source(3)), REPO, RecipeError, "'small' was given as a live module"),
        (lambda: with_licence("cc-by-nd-4.0"), REPO, StitchError, r"'test_resnet' \(cc-by-nd-4.0\) may not be shared"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(
    make: Callable[[], torch.nn.Module], repo: str, kind: type[Exception], words: str, hub: HubDouble
) -> None:
    with pytest.raises(kind, match=words):
        publish(make(), repo)
    assert hub.requests == []


def test_an_override_of_a_licence_is_written_in_the_card(hub: HubDouble) -> None:
    publish(with_licence("cc-by-nd-4.0"), REPO, details=CardDetails(licence="mit", licence_override="I own it."))
    card = hub.files(REPO)["README.md"].decode()
    assert "**Shared in spite of that licence.** The author's reason: I own it." in card


def test_an_unknown_licence_warns_and_is_published(hub: HubDouble) -> None:
    with pytest.warns(UserWarning, match=r"'test_resnet' \(home-made\) is not known.*license: other"):
        publish(with_licence("home-made"), REPO)
    assert "license: other" in hub.files(REPO)["README.md"].decode()


def test_a_network_that_loads_differently_is_not_published(hub: HubDouble) -> None:
    hooked = classifier()
    hooked.head.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(StitchError, match=r"gives other outputs when it is loaded again \(largest difference 1"):
        publish(hooked, REPO)
    assert hub.asked("POST", "") == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/preupload/", cut=True),
        Fault("POST", "/objects/batch", status=500),
        Fault("POST", "/objects/batch", cut=True),
        Fault("PUT", "/lfs/", status=500, times=2),
        Fault("PUT", "/lfs/", status=429, headers={"Retry-After": "7"}),
        Fault("PUT", "/lfs/", cut=True),
    ],
    ids=lambda fault: f"{fault.method}-{fault.path}-{fault.status or 'cut'}",
)
def test_a_fault_while_the_weights_are_sent_passes_by_the_clients_own_retries(
    fault: Fault, hub: HubDouble, model: StitchedClassifier
) -> None:
    fault = Fault(**vars(fault))
    hub.faults = [fault]
    publish(model, REPO)
    assert fault.times == 0
    assert visible(hub) == FILES
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(REPO)), outputs(model))


def test_a_commit_whose_answer_was_lost_is_an_error_and_is_made_once(hub: HubDouble, model: StitchedClassifier) -> None:
    hub.faults = [Fault("POST", "/commit/", status=500, done=True)]
    with pytest.raises(StitchError, match=r"refused to upload to it \(status 500\)\. Try again later"):
        publish(model, REPO)
    # that of the repository's making, and one
    assert len(hub.repos[REPO].commits) == 2
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(REPO)), outputs(model))
    with pytest.raises(StitchError, match=r"already has a README\.md.*existing_card='replace'"):
        publish(model, REPO)
    publish(model, REPO, existing_card="replace")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("GET", "whoami", status=500), r"refused to ask the hub who you are \(status 500\)\. Try again later"),
        (Fault("GET", f"/api/models/{REPO}", status=503), r"refused to look it up \(status 503\)"),
        (Fault("POST", "/repos/create", status=429), r"refused to create it \(status 429\)\. Try again later"),
        (Fault("POST", "/preupload/", cut=True, times=9), r"cannot be reached \(to upload to it\)"),
        (Fault("PUT", "/lfs/", status=500, times=9), r"refused to upload to it \(status 500\)"),
        (Fault("POST", "/commit/", status=401, times=9), r"status 401.*hf auth login"),
        (Fault("POST", "/commit/", status=403, times=9), r"status 403.*may not write there"),
        (Fault("POST", "/commit/", status=412, times=9), r"status 412.*Somebody else committed"),
        (Fault("POST", "/commit/", status=500, times=9), r"status 500.*Try again later"),
        (Fault("POST", "/commit/", cut=True, times=9), r"cannot be reached \(to upload to it\)"),
        (Fault("POST", "/preupload/", status=404, times=9), r"status 404|not there, or not yours to write"),
        (Fault("POST", "/repos/create", status=403, times=9), r"refused to create it \(status 403\)"),
    ],
    ids=lambda value: f"{value.path}-{value.status or 'cut'}" if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_leaves_nothing_partial_and_a_second_call_goes_on(
    fault: Fault, words: str, hub: HubDouble, model: StitchedClassifier
) -> None:
    hub.faults = [Fault(**vars(fault))]
    with pytest.raises(StitchError, match=words):
        publish(model, REPO)
    assert visible(hub) == set()
    hub.faults = []
    arrived = len(hub.blobs)
    hub.requests.clear()
    publish(model, REPO)
    assert visible(hub) == FILES
    # what had arrived is not sent again
    assert hub.asked("PUT", "/lfs/") == 1 - arrived


def test_somebody_elses_commit_in_the_meantime_is_not_overwritten(
    hub: HubDouble, model: StitchedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(model, REPO)
    save = StitchedClassifier.save_pretrained

    def meanwhile(self: StitchedClassifier, *arguments: object, **options: object) -> None:
        save(self, *arguments, **options)
        hub.put(REPO, {"README.md": b"theirs"})

    monkeypatch.setattr(StitchedClassifier, "save_pretrained", meanwhile)
    with pytest.raises(StitchError, match="Somebody else committed"):
        publish(model, REPO, existing_card="replace")
    assert hub.files(REPO) == {"README.md": b"theirs"}


def test_a_download_that_is_cut_goes_on(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    hub.faults = [Fault("GET", "resolve/.*model.safetensors", cut=True)]
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(REPO)), outputs(model))
    assert hub.faults[0].times == 0


def test_a_download_of_other_bytes_is_refused_and_not_kept(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    hub.faults = [Fault("GET", "resolve/.*model.safetensors", damage=True)]
    with pytest.raises(
        SourceError, match=r"model\.safetensors .* did not arrive as the hub has it .*deleted from the cache"
    ):
        StitchedClassifier.from_pretrained(REPO)
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(REPO)), outputs(model))


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    files = hub.files(REPO)
    hub.put(REPO, {**files, "model.safetensors": files["model.safetensors"] + bytes(9)})
    with pytest.raises(
        SourceError, match=r"model\.safetensors of hub repository 'me/digits'.* has \d+ bytes; expected"
    ):
        StitchedClassifier.from_pretrained(REPO)
    assert hub.downloads("model.safetensors") == 0


def test_a_giant_config_is_refused_before_it_is_downloaded(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    hub.put(REPO, {**hub.files(REPO), "config.json": bytes(70 * 2**20)})
    with pytest.raises(SourceError, match=r"config\.json of hub repository 'me/digits'.* has 73400320 bytes"):
        StitchedClassifier.from_pretrained(REPO)
    assert hub.downloads("config.json") == 0


def test_weights_are_fetched_only_for_a_config_that_can_be_read(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    files = hub.files(REPO)
    hub.put(REPO, {**files, "config.json": files["config.json"].replace(b'"format": 2', b'"format": 9')})
    with pytest.raises(RecipeError, match="was saved in format 9"):
        StitchedClassifier.from_pretrained(REPO)
    assert hub.downloads("model.safetensors") == 0


def test_the_clients_own_folder_of_links_loads(hub: HubDouble, model: StitchedClassifier) -> None:
    publish(model, REPO)
    assert torch.equal(outputs(StitchedClassifier.from_pretrained(snapshot_download(REPO))), outputs(model))


@pytest.mark.parametrize(
    ("where", "words"),
    [("me/nothing", "no repository 'me/nothing'"), (f"{REPO}@other", "no revision 'other'")],
)
def test_a_repository_or_revision_that_is_not_there_is_named(
    where: str, words: str, hub: HubDouble, model: StitchedClassifier
) -> None:
    publish(model, REPO)
    with pytest.raises(SourceError, match=words):
        StitchedClassifier.from_pretrained(where)


def test_a_space_beside_it_shows_the_very_commit(hub: HubDouble, model: StitchedClassifier) -> None:
    found = publish(model, REPO, space=True, existing_card="replace")
    assert found.space == f"{hub.url}/spaces/{REPO}"
    files = {name: content.decode() for name, content in hub.files(f"spaces/{REPO}").items()}
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    compile(files["app.py"], "app.py", "exec")
    assert f'from_pretrained("{REPO}@{found.commit}")' in files["app.py"]
    assert files["requirements.txt"].startswith("lightning-stitch[app]==")
    about = RepoCard(files["README.md"]).data.to_dict()
    assert (about["sdk"], about["app_file"], about["models"]) == ("gradio", "app.py", [REPO])
    shown = StitchedClassifier.from_pretrained(f"{REPO}@{found.commit}")
    torch.testing.assert_close(outputs(shown), outputs(model))
    again = publish(model, REPO, space=True, existing_card="replace")
    assert f"{REPO}@{again.commit}" in hub.files(f"spaces/{REPO}")["app.py"].decode()


def test_what_a_space_cannot_show_or_may_not_replace_is_refused_before_anything_is_published(
    hub: HubDouble, model: StitchedClassifier
) -> None:
    assert model.network is not None
    with pytest.raises(StitchError, match="A Space shows a classifier"):
        publish(model.network, REPO, space=True)
    hub.put(f"spaces/{REPO}", {"README.md": b"mine"})
    with pytest.raises(StitchError, match=r"already has a README\.md"):
        publish(model, REPO, space=True)
    assert REPO not in hub.repos
