from __future__ import annotations

import copy
import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.clock import Clock, timed
from doubles.journals import answers, opened
from doubles.pair_searches import BEAM, CALIBRATION, IMAGES, LABELS, SELECTION, never, new_pool, pair, search
from doubles.pools import pieces_run, records
from doubles.small_sources import plain
from safetensors.torch import save
from torch import Tensor

from lightning_stitch import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import JournalError
from lightning_stitch.io.activation_store import Carried
from lightning_stitch.io.journal import Answer, Answers, Journal
from lightning_stitch.search.results import SearchResult
from lightning_stitch.search.space import Filters, SearchSpace
from lightning_stitch.search.strategies import Beam, DepthFirst, Strategy
from lightning_stitch.stitching.candidates import Candidate

ALL = DepthFirst(span=2, threshold=-9, edge_threshold=-9, max_fragments=4)


def backwards(space: SearchSpace) -> Iterator[Candidate]:
    """A user's own strategy: from the last cut of each source, the worst stitches first."""
    for state in space.starts():
        for cut, x in reversed(list(space.walk(state))):
            for edge in sorted(space.edges(state, cut, x, Filters(min_product=-9)), key=lambda edge: edge.cka)[:3]:
                entered = space.enter(edge, x)
                yield space.complete(entered)
                for later, y in space.walk(entered):
                    if later == 1:
                        yield from (space.complete(space.enter(e, y)) for e in space.edges(entered, later, y)[:1])


@pytest.fixture(scope="module")
def uninterrupted() -> SearchResult:
    return search(new_pool())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    search(new_pool(), journal=(folder := tmp_path_factory.mktemp("journal") / "finished"))
    return folder


@pytest.fixture
def journal(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "journal"))


def shorten(journal: Path, count: int) -> None:
    """Leave the first records alone."""
    kept = "SELECT rowid FROM answers ORDER BY rowid LIMIT ?"
    with opened(journal) as database:
        database.execute(f"DELETE FROM answers WHERE rowid NOT IN ({kept})", (count,))


@pytest.mark.parametrize("strategy", [BEAM, ALL, backwards], ids=["beam", "depth first", "own"])
def test_a_finished_journal_gives_the_whole_result_and_nothing_runs(tmp_path: Path, strategy: Strategy) -> None:
    expected = search(new_pool(), strategy=strategy)
    first = search(new_pool(), strategy=strategy, journal=tmp_path)
    pool = new_pool()
    with pieces_run(pool) as ran:
        again = search(pool, strategy=strategy, journal=tmp_path)
    assert ran == []
    assert sum(r.candidate.kind in ("stitched", "shortened") for r in again.ranked) > 6
    assert records(again) == records(first) == records(expected)
    assert again.rejected == first.rejected == expected.rejected
    assert [r.seconds for r in again.ranked] == [r.seconds for r in first.ranked]
    networks = [pool.assemble(result.best.candidate)(IMAGES) for result in (expected, again)]
    assert torch.equal(*networks)


def test_what_was_turned_down_is_remembered_too(tmp_path: Path) -> None:
    def blind(space: SearchSpace) -> Iterator[Candidate]:
        blank = Carried([lambda: torch.zeros_like(space.sources[0].activations[0].whole())])
        assert space.edges(space.starts()[0], 0, blank) == []
        return iter(())

    journals = (None, tmp_path, tmp_path)
    rejected = [search(new_pool(), strategy=blind, journal=journal).rejected for journal in journals]
    assert rejected[0]["activation of the sender does not vary"] > 1
    assert rejected[0] == rejected[1] == rejected[2]


def test_a_search_goes_on_where_its_journal_ends(journal: Path, uninterrupted: SearchResult) -> None:
    whole = answers(journal)
    kinds = [kind for _, kind, _ in whole]
    composed, batches = kinds.index("tap"), len(SELECTION)
    assert kinds[composed:] == ["tap"] * (len(uninterrupted.ranked) * batches)
    runs = []
    for count in (3, 10, composed, composed + len(uninterrupted.ranked), len(whole) - 1, len(whole)):
        shorten(journal, count)
        left, pool = answers(journal), new_pool()
        assert len(left) == count
        with pieces_run(pool) as ran:
            result = search(pool, journal=journal)
        assert records(result) == records(uninterrupted)
        assert result.rejected == uninterrupted.rejected
        assert answers(journal)[:count] == left
        assert [answer[:2] for answer in answers(journal)] == [answer[:2] for answer in whole]
        runs.append(len(ran))
    assert runs == sorted(set(runs), reverse=True)
    assert runs[-1] == 0


@pytest.mark.slow
def test_a_process_that_dies_at_any_record_loses_none_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: SearchResult
) -> None:
    # What the files are at this moment is what a process that is killed now leaves behind.
    moments: list[tuple[Path, list[tuple[str, str, str]]]] = []
    journal, record, recall = tmp_path / "journal", Journal._record, Journal.recall_all

    def remember(made: list[tuple[str, str, str]]) -> None:
        moments.append((Path(shutil.copytree(journal, tmp_path / str(len(moments)))), made))

    def remembering_record(self: Journal, *arguments: Any) -> None:
        before = made_by(self)
        record(self, *arguments)
        # Within the transaction: it is there in full or not at all.
        if len(moments) % 5 == 0:
            remember([] if self._database.in_transaction else before)

    def made_by(self: Journal) -> list[tuple[str, str, str]]:
        return list(self._database.execute("SELECT key, kind, value FROM answers ORDER BY rowid"))

    def remembering_recall(self: Journal, *arguments: Any) -> list[Answer]:
        found = recall(self, *arguments)
        remember(made_by(self))
        return found

    monkeypatch.setattr(Journal, "_record", remembering_record)
    monkeypatch.setattr(Journal, "recall_all", remembering_recall)
    assert records(search(new_pool(), journal=journal)) == records(uninterrupted)
    monkeypatch.undo()
    assert len(moments) > 20
    for left, made in moments:
        assert records(search(new_pool(), journal=left)) == records(uninterrupted)
        assert answers(left)[: len(made)] == made


def test_without_its_last_record_only_that_is_run_again(journal: Path) -> None:
    pools = []
    for count in (len(answers(journal)) - 1, 0):
        shorten(journal, count)
        pools.append(new_pool())
        with pieces_run(pools[-1]) as ran:
            search(pools[-1], journal=journal)
        if count:
            last = len(ran)
    assert 0 < last <= 6 < len(ran)


def another_cka(journal: Path) -> None:
    values = {key: value for key, kind, value in answers(journal) if kind == "ckas"}
    key, value = next((key, value) for key, value in values.items() if re.search(r", 0\.[2-9]", value))
    changed = re.sub(r", 0\.[2-9]", ", 0.1", value, count=1)
    with opened(journal) as database:
        database.execute("UPDATE answers SET value = ? WHERE key = ?", (changed, key))


def other_tensors(journal: Path) -> None:
    with opened(journal) as database:
        contents = list(database.execute("SELECT rowid, content FROM tensors"))
        assert contents
        changed = [(x[:-5] + bytes([x[-5] ^ 1]) + x[-4:], row) for row, x in contents]
        database.executemany("UPDATE tensors SET content = ? WHERE rowid = ?", changed)


def other_activations(journal: Path) -> None:
    flip_bytes(sorted((journal / "calibration").glob("source-*")))


def flip_bytes(files: list[Path]) -> None:
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("damage", [another_cka, other_tensors, other_activations])
def test_what_was_damaged_is_found_and_computed_anew(
    journal: Path, uninterrupted: SearchResult, damage: Callable[[Path], None]
) -> None:
    damage(journal)
    assert records(search(new_pool(), journal=journal)) == records(uninterrupted)
    pool = new_pool()
    with pieces_run(pool) as ran:
        assert records(search(pool, journal=journal)) == records(uninterrupted)
    assert ran == []


def test_networks_of_one_path_and_other_weights_are_told_apart(tmp_path: Path) -> None:
    def twins(space: SearchSpace) -> Iterator[Candidate]:
        candidate = next(BEAM(space))
        yield candidate
        *before, last = candidate.steps
        assert last.stitch is not None
        assert last.stitch.weight is not None
        stitch = copy.deepcopy(last.stitch)
        with torch.inference_mode():
            stitch.weight.neg_()
        yield dataclasses.replace(candidate, ways=((*before, dataclasses.replace(last, stitch=stitch)),))

    def scores(**options: Any) -> set[tuple[float, ...]]:
        ranked = search(new_pool(), strategy=twins, **options).ranked
        return {tuple(r.scores.values()) for r in ranked if r.candidate.kind in ("stitched", "shortened")}

    assert len(scores()) == 2
    assert scores() == scores(journal=tmp_path) == scores(journal=tmp_path)


def test_a_count_is_raised_later_and_what_was_ranked_is_not_run_again(
    tmp_path: Path, uninterrupted: SearchResult
) -> None:
    few = search(new_pool(), max_candidates=3, journal=tmp_path)
    assert sum(r.candidate.kind in ("stitched", "shortened") for r in few.ranked) == 3
    alone, pool = new_pool(), new_pool()
    with pieces_run(alone) as all_runs:
        search(alone)
    with pieces_run(pool) as ran:
        assert records(search(pool, journal=tmp_path)) == records(uninterrupted)
    assert 0 < len(ran) < len(all_runs)
    # The ranking, labels and counts are no part of what is remembered.
    with pieces_run(pool) as ran:
        search(pool, journal=tmp_path, ranking="consensus", max_candidates=5)
        search(pool, journal=tmp_path, selection=IMAGES.split(16))
    assert ran == []


def test_a_journal_takes_an_opened_pool_too(tmp_path: Path, uninterrupted: SearchResult) -> None:
    pool = new_pool()
    pool.calibrate(CALIBRATION.split(5))
    pool.save(tmp_path / "pool")
    for _ in range(2):
        opened = Pool.open(tmp_path / "pool", pair())
        with pieces_run(opened) as ran:
            found = search(opened, calibration=None, journal=tmp_path / "journal")
        assert [r.candidate.recipe.fragments for r in found.ranked] == [
            r.candidate.recipe.fragments for r in uninterrupted.ranked
        ]
    assert ran == []
    opened.calibrate([CALIBRATION.flip(0)])
    with pytest.raises(JournalError, match="calibration images"):
        search(opened, calibration=None, journal=tmp_path / "journal")


def test_measured_latencies_are_remembered(tmp_path: Path, clock: Clock) -> None:
    def found(milliseconds: float) -> SearchResult:
        clock.reset()
        names = ("a", "b")
        sources = [timed(name, (5, 6, 7), [milliseconds] * 3, seed=seed) for seed, name in enumerate(names)]
        return search(new_pool(sources), budget=Budget(max_latency_ms=16), journal=tmp_path)

    first, again = found(5), found(8)
    (way,) = first.best.candidate.ways
    assert first.best.latency_ms == pytest.approx(5 * min(3, sum(step.last - step.first for step in way)))
    assert records(again) == records(first)


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda j: search(new_pool(pair(seed=2)), calibration=never(), journal=j), r'sources\.b\.weights: "sha256:'),
    (lambda j: search(new_pool(pair()[::-1]), calibration=never(), journal=j), r'order: \["a", "b"\] there'),
    (lambda j: search(new_pool(pair()[:1]), calibration=never(), journal=j), r"sources\.b: .* there, nothing here"),
    (
        lambda j: search(new_pool(rows_per_image=9, seed=5), calibration=never(), journal=j),
        r"settings\.rows_per_image: 32 there, 9 here; settings\.seed: 0 there, 5 here\. Search with what it was begun",
    ),
    (lambda j: search(new_pool(), strategy=Beam(width=9), calibration=never(), journal=j), r"strategy: .*width=9"),
    (lambda j: search(new_pool(), strategy=backwards, calibration=never(), journal=j), r'strategy: .*"backwards" here'),
    (
        lambda j: search(new_pool(), budget=Budget(max_macs=1e9), calibration=never(), journal=j),
        r"budget\.max_macs: nothing there, 1000000000\.0 here",
    ),
    (lambda j: search(new_pool(), ridge=0.5, calibration=never(), journal=j), r"ridge: 0\.001 there, 0\.5 here"),
    (lambda j: search(new_pool(), bias=False, calibration=never(), journal=j), "bias: true there, false here"),
    (lambda j: search(new_pool(), calibration=[CALIBRATION.flip(0)], journal=j), "calibration images: "),
    (
        lambda j: search(new_pool(), selection=[*SELECTION[:1], (IMAGES[24:40], LABELS[24:40])], journal=j),
        r"selection images, batch 1: ",
    ),
    (lambda j: search(new_pool(), selection=[(IMAGES, LABELS)], journal=j), r"selection images, batch 0: \[\[16, 3"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_another_searchs_journal_is_refused_with_what_differs(
    journal: Path, change: Callable[[Path], object], words: str
) -> None:
    with opened(journal) as database:
        before = list(database.iterdump())
    with pytest.raises(JournalError, match=rf"The journal in .*journal is of another search: .*{words}"):
        change(journal)
    with opened(journal) as database:
        assert list(database.iterdump()) == before


def test_a_newer_versions_journal_is_refused(journal: Path) -> None:
    with opened(journal) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(JournalError, match=r"has schema 2; this version of lightning_stitch reads schema 1\. Upgrade"):
        search(new_pool(), calibration=never(), journal=journal)


def test_a_directory_that_cannot_be_written_to_is_found_out_before_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "filed" / "journal.sqlite").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "file" / "journal", tmp_path / "filed"):
        with pytest.raises(JournalError, match=r"The journal in .*file.* cannot be written: .*name another directory"):
            search(new_pool(), calibration=never(), selection=never(), journal=path)


def no_database(journal: Path) -> None:
    (journal / "journal.sqlite").write_bytes(b"no database" * 1000)


def torn(journal: Path) -> None:
    file = journal / "journal.sqlite"
    content = bytearray(file.read_bytes())
    content[100:4096] = bytes(3996)
    file.write_bytes(content)


def no_json(journal: Path) -> None:
    with opened(journal) as database:
        database.execute("UPDATE entries SET value = '{' WHERE name = 'ridge'")


@pytest.mark.parametrize("damage", [no_database, torn, no_json])
def test_a_journal_that_cannot_be_read_is_refused(journal: Path, damage: Callable[[Path], None]) -> None:
    damage(journal)
    with pytest.raises(JournalError, match=r"The journal in .* is damaged: .*\. Delete it, or name another directory"):
        search(new_pool(), calibration=never(), journal=journal)


@pytest.fixture
def room() -> Iterator[Callable[[int | None], None]]:
    """How many bytes any file may have from now on; None: as many as ever."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limited
    limited(None)


def test_a_full_disk_is_found_out_before_an_image_is_read(
    tmp_path: Path, room: Callable[[int | None], None], uninterrupted: SearchResult
) -> None:
    pool = new_pool()
    for size in (0, 10, 1000, 5000):
        room(size)
        with pytest.raises(JournalError, match=r"cannot be written: .*Make room or name another directory"):
            search(pool, calibration=never(), selection=never(), journal=tmp_path)
    room(None)
    assert records(search(pool, journal=tmp_path)) == records(uninterrupted)


def test_a_disk_that_fills_up_loses_nothing_that_was_found(
    tmp_path: Path, room: Callable[[int | None], None], uninterrupted: SearchResult
) -> None:
    search(new_pool(), max_candidates=0, journal=tmp_path)
    for size in (5_000, 20_000, 40_000):
        room(size)
        with pytest.raises(JournalError, match="cannot be written"):
            search(new_pool(keep_activations="memory"), journal=tmp_path)
        room(None)
    assert records(search(new_pool(), journal=tmp_path)) == records(uninterrupted)


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    held = "import sys\nfrom lightning_stitch.io import Journal\nwith Journal(sys.argv[1]):\n  print('held'), input()"
    holder = subprocess.Popen(
        [sys.executable, "-u", "-c", held, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(JournalError, match="is in use, by this process or another"):
            search(new_pool(), calibration=never(), journal=tmp_path)
        holder.kill()
    search(new_pool(), max_candidates=0, journal=os.fspath(tmp_path))


def test_a_journal_is_let_go_of_when_it_is_left(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(JournalError, match="is in use"):
        Journal(tmp_path)
    with pytest.raises(ZeroDivisionError), Journal(tmp_path) as journal:
        journal.recall(["sum"], lambda: Answer(1 / 0), float)
    with Journal(tmp_path) as journal:
        assert journal.recall(["sum"], lambda: Answer(0.1 + 0.2), float).value == 0.1 + 0.2
    with Journal(tmp_path) as journal:
        assert journal.recall(["sum"], lambda: Answer(0.5), float).value == 0.1 + 0.2


def test_of_several_questions_only_those_are_computed_that_are_not_remembered(tmp_path: Path) -> None:
    computed: list[int] = []

    def squares(asked: list[int], places: Sequence[int]) -> list[Answer]:
        computed.extend(places)
        return [Answer(place, {"square": torch.tensor([asked[place] ** 2])}) for place in places]

    with Journal(tmp_path) as journal:
        journal.recall(["of", 1], lambda: Answer(1, {"square": torch.tensor([1])}), int)
        for asked in ([0, 1, 2, 2], [2, 1, 0]):
            found = journal.recall_all([["of", number] for number in asked], partial(squares, asked), int)
            assert [int(answer.tensors["square"]) for answer in found] == [number**2 for number in asked]
    assert computed == [0, 2, 3]
    found = Answers().recall_all([["of", 5], ["of", 1]], partial(squares, [5, 1]), int)
    assert [answer.value for answer in found] == [0, 1]


def test_activations_are_deferred_but_the_same(tmp_path: Path) -> None:
    # Each cut of a walk is looked at in whatever order, or never.
    found = []
    for order in ([0, 1], [1, 0], [1]):
        seen: dict[int, Tensor] = {}

        def walked(space: SearchSpace, order: list[int], seen: dict[int, Tensor]) -> Iterator[Candidate]:
            state = space.starts()[0]
            cut, x = next(iter(space.walk(state)))
            edge = next(
                e for e in space.edges(state, cut, x, Filters(min_product=-9)) if (e.source, e.receiver) == (1, 0)
            )
            reached = dict(space.walk(space.enter(edge, x)))
            seen |= {at: reached[at + 1].whole() for at in order if at + 1 in reached}
            return iter(())

        search(
            new_pool([pair()[0], plain("b", (4, 7, 12), seed=1)], granularity="all"),
            strategy=partial(walked, order=order, seen=seen),
        )
        found.append(seen)
    assert len(found[0]) == 2
    for seen in found[1:]:
        assert all(torch.equal(x, found[0][at]) for at, x in seen.items())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("answers.value", b"5"),
        ("answers.value", "{"),
        ("answers.value", "3.0"),
        ("answers.value", '["3"]'),
        ("tensors.content", "words"),
        ("tensors.content", b"12345678"),
        ("entries.value", b"\xff"),
    ],
)
def test_what_has_another_type_is_damage_even_where_the_checksum_is_right(
    column: str, value: Any, tmp_path: Path
) -> None:
    def ask() -> None:
        with Journal(tmp_path) as journal:
            journal.agree({"a": 1})
            journal.recall(["kind", 1], lambda: Answer([1.0], {"x": torch.ones(2)}), tuple[float, ...])

    ask()
    table, _, name = column.partition(".")
    with opened(tmp_path) as database:
        database.execute(f"UPDATE {table} SET {name} = ?", (value,))
        [(text,)] = database.execute("SELECT value FROM answers")
        [(content,)] = database.execute("SELECT content FROM tensors")
        if isinstance(text, str) and isinstance(content, bytes):
            database.execute("UPDATE answers SET checksum = ?", (zlib.crc32(content, zlib.crc32(text.encode())),))
    with pytest.raises(JournalError, match=r"is damaged: .*Delete it, or name another"):
        ask()


def forge(journal: Path, key: str, value: str | None, tensors: dict[str, Tensor] | None) -> None:
    """Give an answer another value, or other tensors, with the checksum that goes with them."""
    with opened(journal) as database:
        [(text,)] = database.execute("SELECT value FROM answers WHERE key = ?", (key,))
        contents = dict(database.execute("SELECT name, content FROM tensors WHERE key = ? ORDER BY name", (key,)))
        if tensors is not None:
            contents = {name: save({name: x}) for name, x in sorted(tensors.items())}
        database.execute("DELETE FROM tensors WHERE key = ?", (key,))
        rows = [(key, name, content) for name, content in contents.items()]
        database.executemany("INSERT INTO tensors VALUES (?, ?, ?)", rows)
        value = text if value is None else value
        checksum = zlib.crc32(b"".join([value.encode(), *contents.values()]))
        database.execute("UPDATE answers SET value = ?, checksum = ? WHERE key = ?", (value, checksum, key))


NONSENSE = ['"words"', "[]", "[3]", "[[[9999, 0.5]], {}]", '[[["a", 0.5]], {}]', '{"r2": "high"}', "true"]
STRANGERS: list[dict[str, Tensor]] = [{}, {"vector": torch.ones(3)}, {"vector": torch.ones(16, 2)}]


@pytest.mark.parametrize("kind", ["ckas", "stitch", "tap"])
def test_an_answer_of_another_kind_is_damage_wherever_it_is_read(kind: str, journal: Path, tmp_path: Path) -> None:
    keys = [key for key, name, _ in answers(journal) if name == kind]
    forgeries = [(value, None) for value in NONSENSE]
    if kind != "ckas":
        forgeries += [(None, tensors) for tensors in STRANGERS]
    for number, (value, tensors) in enumerate(forgeries):
        forged = Path(shutil.copytree(journal, tmp_path / f"forged_{number}"))
        forge(forged, keys[number % len(keys)], value, tensors)
        with pytest.raises(JournalError, match=r"is damaged: .*Delete it, or name another"):
            search(new_pool(), journal=forged)
