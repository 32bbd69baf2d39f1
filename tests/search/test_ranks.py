"""Ranks that search together: the same result as one process's, each over its share of the images."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from doubles.search_ranks import run_rank
from torch.multiprocessing.spawn import spawn

pytestmark = pytest.mark.slow  # each starts processes

SCENARIOS = {
    1: ["search"],
    2: ["search", "other candidates", "other images", "journal", "journal of which rank 1 lost its own"],
    3: ["search", "failure"],
    4: ["search"],
}


@cache
def records(world_size: int) -> dict[str, list[dict[str, Any]]]:
    """What each of several ranks wrote down, by scenario."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, args=(world_size, folder, SCENARIOS[world_size]), nprocs=world_size)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]
    return {what: [of_rank[what] for of_rank in ranks] for what in SCENARIOS[world_size]}


def alone() -> dict[str, Any]:
    return records(1)["search"][0]


def assert_as_alone(world_size: int) -> None:
    found = records(world_size)["search"]
    for record in found:
        assert record["result"] == alone()["result"]
        assert record["head"] == alone()["head"]
    # Seven batches: of two ranks one has four of them, of three one three, of four each two but one.
    selection = [record["images"] - alone()["calibration"] for record in found]
    assert sum(selection) == alone()["images"] - alone()["calibration"]
    assert max(selection) <= -(-7 // world_size) * 10


def test_two_ranks_end_with_what_one_process_finds_and_share_its_passes() -> None:
    assert_as_alone(2)


@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks_do_so_too(world_size: int) -> None:
    assert_as_alone(world_size)


def test_a_rank_that_fails_takes_the_others_along_with_its_own_words() -> None:
    first, second, third = records(3)["failure"]
    assert second["error"] == "CalibrationError: the images of rank 1 are damaged"
    for other in (first, third):
        assert other["error"].startswith("OtherRankFailed: Rank 1 of 3 failed, and with it this one.")
        assert "the images of rank 1 are damaged" in other["error"]
        assert other["seconds"] < 30


def test_ranks_with_other_candidates_work_each_for_itself() -> None:
    first, second = records(2)["other candidates"]
    assert first["result"] == alone()["result"]
    assert first["images"] == alone()["images"]
    assert second["result"] != alone()["result"]


def test_ranks_with_other_images_are_refused() -> None:
    for record in records(2)["other images"]:
        assert "Ranks were given different images" in record["error"]


def test_one_rank_whose_journal_was_lost_keeps_step_with_the_others() -> None:
    for what in ("journal", "journal of which rank 1 lost its own"):
        for record in records(2)[what]:
            assert record["result"] == alone()["result"]
    first, second = records(2)["journal of which rank 1 lost its own"]
    assert first["images"] < second["images"]
