from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from doubles.configs import config_file
from doubles.hub import HubDouble
from doubles.predictions import classifier, save_checkpoint, write_digits
from doubles.published_networks import network, together
from huggingface_hub import ModelCard

from lightning_stitch import StitchedClassifier
from lightning_stitch.cli.main import main

# The hub's client says this of itself, with newer versions of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/digits"


def test_a_checkpoint_is_published_with_its_table(
    hub: HubDouble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    checkpoint = save_checkpoint(classifier().eval(), tmp_path / "stitched.ckpt")
    rows = [{"name": "StitchNet", "kind": "stitched", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}]
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": rows, "verdict": "Inside the noise."}))
    options = ["--private=true", "--dataset=digits", "--metrics.accuracy=0.5", "--num_images=30"]
    main(["publish", str(checkpoint), REPO, *options])
    assert f"commit {hub.repos[REPO].branches['main']}" in capsys.readouterr().out
    assert hub.repos[REPO].private
    card = hub.files(REPO)["README.md"].decode()
    assert "| StitchNet | stitched | 0.500 [0.40, 0.60] |" in card
    assert "Inside the noise." in card
    with pytest.raises(SystemExit):
        main(["publish", str(checkpoint), REPO])
    assert "already has a README.md" in capsys.readouterr().err


def test_a_comparison_whose_verdict_is_no_sentence_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [], "verdict": ["x"]}))
    with pytest.raises(SystemExit):
        main(["publish", str(tmp_path / "stitched.ckpt"), REPO])
    assert "verdict should be a sentence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics.accuracy=.nan", "--dataset=digits"], "finite numbers"),
        (["--metrics.accuracy=0.5"], "give dataset= as well"),
        (["--comparison=nowhere.json"], "nowhere.json is no comparison.json"),
    ],
)
def test_an_option_that_cannot_be_used_is_an_error_before_the_checkpoint_is_read(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["publish", "nowhere.ckpt", REPO, *options])
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_folders_of_every_kind_are_published(
    hub: HubDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, saved in {"network": network(), "ensemble": together(), "classifier": classifier().eval()}.items():
        saved.save_pretrained(tmp_path / kind)
        main(["publish", str(tmp_path / kind), f"lab/{kind}"])
        assert hub.files(f"lab/{kind}")["model.safetensors"] == (tmp_path / kind / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main(["publish", str(tmp_path / "network"), "lab/other", "--class_names", "a", "b"])
    assert "--class_names names a classifier's outputs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_configuration_publishes_what_it_composed_and_trained(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    path = config_file(tmp_path, write_digits(tmp_path / "images", 240), max_epochs=1, search={"compare": True})
    config = yaml.safe_load(path.read_text())
    details = {
        "class_path": "lightning_stitch.CardDetails",
        "init_args": {"dataset": "me/cells", "limits": ["A trial."]},
    }
    publishing = {"repo_id": REPO, "private": True, "details": details}
    config["trainer"]["callbacks"].append({"class_path": "lightning_stitch.PublishAfterFit", "init_args": publishing})
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert card.data.datasets == ["me/cells"]
    assert "- A trial." in card.content
    assert "McNemar" in card.content
    assert "orth it" in card.content
    assert StitchedClassifier.from_pretrained(REPO).num_classes == 3
