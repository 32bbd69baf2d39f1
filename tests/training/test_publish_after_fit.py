from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from doubles.fragment_searches import digits as digits_module
from doubles.fragment_searches import search, trainer
from doubles.hub import TOKEN, HubDouble
from doubles.hub_server import environment_of
from doubles.predictions import classifier, quiet_trainer
from doubles.tensors import digits, noise
from huggingface_hub import ModelCard
from pytorch_lightning.strategies import SingleDeviceStrategy

from lightning_stitch import CardDetails, PublishAfterFit, StitchedClassifier, StitchError, load_source
from lightning_stitch.hub.card import inline

# The hub's client says this of itself, with newer versions of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/digits"
IMAGES = noise(2, 3, 16, 16)


def outputs(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IMAGES)


def fit_publishing(
    callback: PublishAfterFit, folder: Path, *, model: StitchedClassifier | None = None, **options: object
) -> StitchedClassifier:
    model = model or classifier()
    images = torch.utils.data.TensorDataset(*digits(30, 16, classes=3))
    trainer = quiet_trainer(folder, callbacks=[callback], max_epochs=1, **options)
    loader = torch.utils.data.DataLoader(images, batch_size=30)
    trainer.fit(model, loader, loader)
    return model.eval()


def test_a_trainer_publishes_what_fit_trained(hub: HubDouble, tmp_path: Path) -> None:
    callback = PublishAfterFit(REPO, private=True)
    model = fit_publishing(callback, tmp_path)
    assert callback.publication is not None
    assert callback.publication.commit == hub.commit(REPO)
    pulled = StitchedClassifier.from_pretrained(REPO)
    assert torch.equal(outputs(pulled), outputs(model))
    assert not torch.equal(outputs(pulled), outputs(classifier().eval()))


def test_a_trial_run_publishes_nothing(hub: HubDouble, tmp_path: Path) -> None:
    fit_publishing(PublishAfterFit(REPO), tmp_path, fast_dev_run=True)
    assert hub.requests == []


def test_a_trainer_checks_credentials_before_it_trains(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    monkeypatch.setattr(StitchedClassifier, "training_step", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(StitchError, match="hf auth login"):
        fit_publishing(PublishAfterFit(REPO), tmp_path)


def test_a_wrong_repository_name_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(StitchError, match=re.escape("A repository is 'ORG/NAME'")):
        PublishAfterFit("digits")


@pytest.mark.parametrize(
    ("licence", "put", "options", "words"),
    [
        ("mit", {"README.md": b"mine"}, {}, r"already has a README\.md"),
        ("mit", {"notes.txt": b"kept"}, {"private": True}, "private=True asks for a private one"),
        ("cc-by-nd-4.0", {"notes.txt": b"kept"}, {}, r"\(cc-by-nd-4\.0\) may not be shared in changed form"),
    ],
)
def test_what_would_be_refused_at_the_end_is_refused_before_it_trains(
    licence: str,
    put: dict[str, bytes],
    options: dict[str, bool],
    words: str,
    hub: HubDouble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.put(REPO, put)
    monkeypatch.setattr(StitchedClassifier, "training_step", lambda *arguments: pytest.fail("trained"))
    model = classifier(load_source("test_resnet", pretrained=False, licence=licence))
    with pytest.raises(StitchError, match=words):
        fit_publishing(PublishAfterFit(REPO, **options), tmp_path, model=model)
    assert hub.files(REPO) == put


def test_the_card_tells_what_the_last_validation_found(hub: HubDouble, tmp_path: Path) -> None:
    details = CardDetails(dataset="org/digits")
    model = fit_publishing(PublishAfterFit(REPO, details=details), tmp_path)
    results = ModelCard(hub.files(REPO)["README.md"].decode()).data.eval_results
    images, labels = digits(30, 16, classes=3)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    [found] = [result for result in results if result.metric_type == "accuracy"]
    assert found.metric_value == pytest.approx(accuracy)
    assert (found.dataset_split, found.dataset_args) == ("validation", {"num_images": 30})


def test_a_metric_that_is_no_number_is_left_out_of_the_card(hub: HubDouble, tmp_path: Path) -> None:
    callback = PublishAfterFit(REPO, details=CardDetails(dataset="org/digits"))
    images, labels = digits(30, 16, classes=3)
    train = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=30)
    one_class = torch.utils.data.TensorDataset(images[labels == 1], labels[labels == 1])
    validation = torch.utils.data.DataLoader(one_class, batch_size=30)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    with pytest.warns(UserWarning, match="The AUROC is undefined, NaN: all .* images are of class 1"):
        trainer.fit(classifier(), train, validation)
    results = ModelCard(hub.files(REPO)["README.md"].decode()).data.eval_results
    found = {result.metric_type for result in results}
    assert "accuracy" in found
    assert "auroc" not in found


def test_the_card_has_the_table_of_the_search_that_composed_the_network(hub: HubDouble, tmp_path: Path) -> None:
    searching = search(compare=True)
    run = trainer(tmp_path, searching, PublishAfterFit(REPO))
    run.fit(StitchedClassifier(num_classes=3), digits_module())
    assert searching.comparison is not None
    card = hub.files(REPO)["README.md"].decode()
    for line in searching.comparison.words.splitlines():
        assert inline(line.strip()) in card
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    for row in searching.comparison.rows:
        start, end = f"| {row['name']} | {row['kind']} | {row['sources']} |", f"| {row['verdict'] or '-'} |"
        assert any(line.startswith(start) and line.endswith(end) for line in lines)
    assert any(row["verdict"] for row in searching.comparison.rows)


def test_a_module_of_ones_own_is_told_how_its_network_is_published(hub: HubDouble, tmp_path: Path) -> None:
    class Own(pl.LightningModule):
        def training_step(self, batch: torch.Tensor) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(StitchError, match=r"found Own\..*lightning_stitch\.publish\(network, 'me/digits'\)"):
        quiet_trainer(tmp_path, callbacks=[PublishAfterFit(REPO)]).fit(Own(), [torch.zeros(1)])


def test_every_rank_fails_where_rank_zero_may_not_publish(hub: HubDouble, tmp_path: Path) -> None:
    class SecondRank(SingleDeviceStrategy):
        is_global_zero = False

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            return "rank zero may not write there" if obj is None else obj

    run = quiet_trainer(
        tmp_path,
        callbacks=[PublishAfterFit(REPO)],
        strategy=SecondRank(device=torch.device("cpu")),
        accelerator="auto",
        max_epochs=1,
    )
    with pytest.raises(StitchError, match="rank zero may not write there"):
        run.fit(classifier(), [digits(30, 16, classes=3)], [digits(30, 16, classes=3)])
    assert hub.requests == []


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from doubles.predictions import classifier, quiet_trainer
from doubles.tensors import digits
from lightning_stitch import PublishAfterFit
if __name__ == "__main__":
    images = torch.utils.data.TensorDataset(*digits(30, 16, classes=3))
    callback = PublishAfterFit(sys.argv[3])
    run = quiet_trainer(Path(sys.argv[1]), callbacks=[callback], max_epochs=1, strategy="ddp", devices=2)
    run.fit(classifier(), torch.utils.data.DataLoader(images, batch_size=15))
    done = None if callback.publication is None else callback.publication.commit
    (Path(sys.argv[1]) / f"rank{run.global_rank}.json").write_text(json.dumps(done))
"""


@pytest.mark.slow
def test_of_two_ranks_one_publishes_and_both_stop_where_it_may_not(hub: HubDouble, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)

    def run(repo: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1]), repo]
        environment = {**os.environ, **environment_of(hub, str(tmp_path / "cache"))}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    done = run(REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)] == [hub.commit(REPO), None]
    assert hub.asked("POST", "/commit/") == 1
    refused = run(REPO)
    assert refused.returncode != 0
    assert "already has a README.md" in refused.stderr
    assert hub.asked("POST", "/commit/") == 1
