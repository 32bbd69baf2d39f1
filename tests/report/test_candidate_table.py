from __future__ import annotations

import csv
from pathlib import Path

import pytest
from doubles.clock import Clock, timed
from doubles.tensors import digits, noise

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.report.tables import write_candidates
from lightning_stitch.search.results import SearchResult

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)


@pytest.fixture
def result(clock: Clock) -> SearchResult:
    """A search whose sources are over its budget in part, so that some latencies are measured and some are not."""
    pool = Pool([timed("slow", (8, 9, 10), (1, 10, 1)), timed("fast", (8, 9, 12), (1, 1, 1), seed=1)], SHAPE)
    return pool.search([CALIBRATION], [digits(40, 16, first=20, classes=3)], budget=Budget(max_latency_ms=6))


def test_there_is_a_row_for_each_candidate_with_its_place_costs_and_scores(result: SearchResult) -> None:
    rows = result.to_records()
    assert [row["place"] for row in rows] == list(range(1, len(result.ranked) + 1))
    for row, r in zip(rows, result.ranked, strict=True):
        cost = r.candidate.cost
        assert (row["kind"], row["params"], row["macs"]) == (r.candidate.kind, cost.params, cost.macs)
        assert (row["activation_bytes"], row["latency_ms"]) == (r.activation_bytes, r.latency_ms)
        assert {name: row[name] for name in r.scores} == r.scores
        assert row["on_pareto_macs"] == any(r is kept for kept in result.pareto("macs"))
        assert row["on_pareto_params"] == any(r is kept for kept in result.pareto("params"))
    for measure in ("macs", "params"):
        assert 0 < sum(row[f"on_pareto_{measure}"] for row in rows) == len(result.pareto(measure)) < len(rows)  # type: ignore[arg-type]


def test_fragments_are_in_words(result: SearchResult) -> None:
    for row, r in zip(result.to_records(), result.ranked, strict=True):
        words = [f"{f.source}: {f.start or 'image'} .. {f.end}" for f in (run.ref for run in r.candidate.recipe.runs)]
        assert row["path"] == " -> ".join(words) + " (ends early)" * (row["kind"] == "early exit")
    paths = {row["path"] for row in result.to_records()}
    assert len(paths) == len(result.ranked)
    assert {"fast: image .. 2", "slow: image .. 0 (ends early)"} < paths


def test_the_file_holds_the_rows_and_replaces_an_older_one(result: SearchResult, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "candidates.csv").write_text("older\n" * 999)
    path = write_candidates(result, folder)
    assert path == folder / "candidates.csv"
    with path.open() as file:
        found = list(csv.DictReader(file))
    expected = result.to_records()
    assert found == [{name: "" if value is None else str(value) for name, value in row.items()} for row in expected]
    assert "" in {row["latency_ms"] for row in found}
    assert write_candidates(result, tmp_path / "new" / "folder").is_file()
