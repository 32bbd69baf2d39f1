from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fragment_searches import digits, same_but_for_shares, search, trainer
from pytorch_lightning.strategies import SingleDeviceStrategy

from lightning_stitch import Beam, JournalError, StitchedClassifier
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.stitching.candidates import Candidate


def test_a_run_that_was_stopped_goes_on_with_its_journal(tmp_path: Path) -> None:
    def stops(candidates: Any, data: Any) -> Any:
        raise RuntimeError("the power failed")

    expected, model = StitchedClassifier(num_classes=3), StitchedClassifier(num_classes=3)
    journal = tmp_path / "journal"
    trainer(tmp_path, search()).fit(expected, digits())
    with pytest.raises(RuntimeError, match="the power failed"):
        trainer(tmp_path, search(ranking=stops, journal=str(journal))).fit(model, digits())
    files = {file: file.stat().st_mtime_ns for file in journal.rglob("*.*")}
    assert len(files) > 10
    trainer(tmp_path, search(journal=str(journal))).fit(model, digits())
    assert same_but_for_shares(model.recipe, expected.recipe)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    # All was remembered, so that nothing was written.
    assert {file: file.stat().st_mtime_ns for file in journal.rglob("*.*")} == files
    with pytest.raises(JournalError, match=r"ridge: 0\.001 there, 0\.5 here"):
        trainer(tmp_path, search(journal=str(journal), ridge=0.5)).fit(StitchedClassifier(num_classes=3), digits())


def test_each_of_several_ranks_has_a_journal_of_its_own(tmp_path: Path) -> None:
    class OneOfTwo(SingleDeviceStrategy):
        def __init__(self) -> None:
            super().__init__(torch.device("cpu"))
            self.world_size = 2

    run = trainer(tmp_path, search(journal=str(tmp_path / "journal")), strategy=OneOfTwo(), accelerator="auto")
    run.fit(StitchedClassifier(num_classes=3), digits())
    assert [folder.name for folder in (tmp_path / "journal").iterdir()] == ["rank_0"]


def test_a_fast_dev_run_leaves_the_journal_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, search(journal=str(tmp_path / "journal")), fast_dev_run=True)
    run.fit(StitchedClassifier(num_classes=3), digits())
    assert not (tmp_path / "journal").exists()


def pressed(space: SearchSpace) -> Iterator[Candidate]:
    """A strategy during which Ctrl-C is pressed."""
    yield next(Beam()(space))
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("went on")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": pressed}, "The search was interrupted."),
        ({"time_limit": 1e-9}, "The time limit ended the search early."),
    ],
)
def test_a_search_that_is_stopped_installs_the_best_so_far_and_fitting_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    model, callback = StitchedClassifier(num_classes=3), search(**options)
    run = trainer(tmp_path, callback, max_epochs=1, enable_progress_bar=True)
    run.fit(model, digits())
    assert callback.result is not None
    assert same_but_for_shares(model.recipe, callback.result.best.candidate.recipe)
    assert run.global_step > 0
    assert words in " ".join(capsys.readouterr().out.split())
