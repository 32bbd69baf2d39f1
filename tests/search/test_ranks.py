"""Ranks that search together: the same result as one process's, each over its share of the images."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest
from doubles.search_ranks import run_rank
from torch.multiprocessing.spawn import spawn


def records(folder: Path, world_size: int, what: str = "search") -> list[dict]:
    spawn(run_rank, args=(world_size, str(folder), what, f"meeting_{uuid4().hex}"), nprocs=world_size)
    return [json.loads((folder / f"{world_size}_{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return records(tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize("world_size", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def test_ranks_end_with_what_one_process_finds_and_share_its_passes(
    tmp_path: Path, alone: dict, world_size: int
) -> None:
    found = records(tmp_path, world_size)
    for record in found:
        assert record["result"] == alone["result"]
        assert record["head"] == alone["head"]
    # Seven batches: of two ranks one has four of them, of three one three, of four each two but one.
    selection = [record["images"] - alone["calibration"] for record in found]
    assert sum(selection) == alone["images"] - alone["calibration"]
    assert max(selection) <= -(-7 // world_size) * 10


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_others_along_with_its_own_words(tmp_path: Path) -> None:
    first, second, third = records(tmp_path, 3, "failure")
    assert second["error"] == "CalibrationError: the images of rank 1 are damaged"
    for other in (first, third):
        assert other["error"].startswith("OtherRankFailed: Rank 1 of 3 failed, and with it this one.")
        assert "the images of rank 1 are damaged" in other["error"]
        assert other["seconds"] < 30


@pytest.mark.slow
def test_ranks_with_other_candidates_work_each_for_itself(tmp_path: Path, alone: dict) -> None:
    first, second = records(tmp_path, 2, "other candidates")
    assert first["result"] == alone["result"]
    assert first["images"] == alone["images"]
    assert second["result"] != alone["result"]


@pytest.mark.slow
def test_ranks_with_other_images_are_refused(tmp_path: Path) -> None:
    for record in records(tmp_path, 2, "other images"):
        assert "Ranks were given different images" in record["error"]


@pytest.mark.slow
def test_one_rank_with_a_journal_that_was_cut_short_keeps_step_with_the_others(tmp_path: Path, alone: dict) -> None:
    for _ in range(2):
        for record in records(tmp_path, 2, "journal"):
            assert record["result"] == alone["result"]
        journal = tmp_path / "journal_1" / "journal.sqlite"
        assert journal.exists()
        for file in journal.parent.iterdir():
            if file.is_file():
                file.unlink()  # rank 1 has lost what it found
