from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles.clock import CLOCK, Clock
from doubles.pair_searches import BEAM, SELECTION, never, new_pool, search
from doubles.pools import pieces_run, records
from doubles.progress import Recorder

from lightning_stitch.cost import Budget
from lightning_stitch.errors import BudgetError, StitchError
from lightning_stitch.io.activation_store import Carried
from lightning_stitch.search import stopping
from lightning_stitch.search.ranking import SelectionData
from lightning_stitch.search.results import SearchResult
from lightning_stitch.search.space import Edge, SearchSpace, State
from lightning_stitch.search.strategies import Strategy
from lightning_stitch.stitching.candidates import Candidate


@pytest.fixture
def seconds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that goes on by a second each time that a search looks whether its time is over."""
    monkeypatch.setattr(stopping, "time", CLOCK)
    clock.each_look = 1
    return clock


@pytest.fixture(scope="module")
def uninterrupted() -> SearchResult:
    return search(new_pool())


def kinds(result: SearchResult) -> list[str]:
    return [r.candidate.kind for r in result.ranked]


def walked(space: SearchSpace, edge: Edge, x: Carried, entered: State) -> int:
    return len(list(space.walk(entered)))


def run(space: SearchSpace, edge: Edge, x: Carried, entered: State) -> int:
    *_, (_, last) = steps = list(space.walk(entered))
    last.whole()
    # Each cut that is walked to, and each piece that is run.
    return 2 * len(steps)


def scored(space: SearchSpace, edge: Edge, x: Carried, entered: State) -> int:
    space.edges(edge.state, 0, x)
    return 1


def scored_alone(space: SearchSpace, edge: Edge, x: Carried, entered: State) -> int:
    space.edge(edge.state, 0, x, 1, 0)
    return 1


def fitted(space: SearchSpace, edge: Edge, x: Carried, entered: State) -> int:
    space.enter(edge, x)
    return 1


@pytest.mark.parametrize("act", [walked, run, scored, scored_alone, fitted])
def test_a_strategy_that_would_go_on_for_ever_is_stopped_by_the_time_limit(
    seconds: Clock, act: Callable[[SearchSpace, Edge, Carried, State], int]
) -> None:
    acts: list[int] = []

    def endless(space: SearchSpace) -> Iterator[Candidate]:
        x = space.sources[0].activations[0]
        edge = space.edge(space.starts()[0], 0, x, 1, 0)
        assert edge is not None
        entered = space.enter(edge, x)
        begun = seconds.now
        while True:
            acts.append(act(space, edge, x, entered))
            # It is looked at at least once in each.
            assert sum(acts) <= seconds.now - begun
            yield from ()

    result = search(new_pool(), strategy=endless, time_limit=100)
    assert result.stopped == "time limit"
    assert sum(acts) > 10
    assert seconds.now < 110
    assert kinds(result).count("self-stitched") == 2
    assert result.summary().endswith("The time limit ended the search early.")


def test_the_longer_the_time_the_more_is_found(seconds: Clock, uninterrupted: SearchResult) -> None:
    counts = []
    search(new_pool(), time_limit=1e9)
    whole = seconds.now
    for share in (0.01, 0.2, 0.4, 0.6, 0.8, 1):
        seconds.now = 0
        result = search(new_pool(), time_limit=share * whole)
        assert result.stopped == (None if share == 1 else "time limit")
        counts.append(len(result.ranked))
        # The sources as they are and ended early cost nothing to compose, and are always there.
        assert kinds(result).count("source") == 2
        assert kinds(result).count("early exit") == 4
        expected = {str(r.candidate.recipe.fragments): r.scores for r in uninterrupted.ranked}
        assert all(r.scores == expected[str(r.candidate.recipe.fragments)] for r in result.ranked)
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert records(result) == records(uninterrupted)


def test_without_a_limit_no_clock_is_asked(seconds: Clock) -> None:
    search(new_pool(), max_candidates=1)
    assert seconds.now == 0


def test_a_time_limit_is_a_positive_number_of_seconds() -> None:
    for limit in (0, -1, float("nan")):
        with pytest.raises(StitchError, match=f"time_limit is a positive number of seconds, or None; found {limit}"):
            search(new_pool(), calibration=never(), time_limit=limit)


def test_a_budget_that_a_stopped_search_did_not_reach_says_so(seconds: Clock) -> None:
    pool = new_pool()
    least = min(part.cost.macs for part in pool.parts)
    with pytest.raises(
        BudgetError, match=r"found no network within the budget .* The time limit ended the search early"
    ):
        search(pool, budget=Budget(max_macs=0.99 * least), exits=False, time_limit=0.5)


def pressed_after(count: int) -> Strategy:
    """Ctrl-C after so many StitchNets, as Python delivers it."""

    def strategy(space: SearchSpace) -> Iterator[Candidate]:
        for number, candidate in enumerate(BEAM(space)):
            if number == count:
                signal.raise_signal(signal.SIGINT)
            yield candidate

    return strategy


@pytest.mark.parametrize("count", [0, 1, 4])
def test_ctrl_c_while_composing_ranks_what_there_is(uninterrupted: SearchResult, count: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    result = search(new_pool(), strategy=pressed_after(count))
    assert result.stopped == "interrupted"
    assert sum(kind in ("stitched", "shortened") for kind in kinds(result)) == count
    found = {str(r.candidate.recipe.to_dict()) for r in result.ranked}
    assert found <= {str(r.candidate.recipe.to_dict()) for r in uninterrupted.ranked}
    assert result.summary().endswith("The search was interrupted.")
    assert signal.getsignal(signal.SIGINT) is handler
    assert uninterrupted.stopped is None


def test_no_loader_is_open_while_it_composes() -> None:
    # Ctrl-C reaches a loader's workers, too, and ranking would find them gone.
    class Loader:
        opened = 0

        def __iter__(self) -> Iterator[Any]:
            self.opened += 1
            try:
                yield from SELECTION
            finally:
                self.opened -= 1

    def strategy(space: SearchSpace) -> Iterator[Candidate]:
        assert loader.opened == 0
        return BEAM(space)

    loader = Loader()
    expected = records(search(new_pool(), ranking="loo_r2"))
    result = search(new_pool(), selection=loader, ranking="loo_r2", strategy=strategy)
    assert records(result) == expected
    # What can be read only once is not read twice.
    result = search(new_pool(), selection=iter(SELECTION), ranking="loo_r2")
    assert records(result) == expected


def test_ctrl_c_at_any_piece_that_composing_runs_loses_nothing(tmp_path: Path, uninterrupted: SearchResult) -> None:
    stopped = []
    for number in range(12):
        pool, recorder = new_pool(), Recorder()
        left = iter(range(number))

        def press(*_: object, left: Iterator[int] = left, recorder: Recorder = recorder) -> None:
            if recorder.stages[-1][0] == "composing" and next(left, None) is None:
                signal.raise_signal(signal.SIGINT)

        for part in pool.parts:
            for piece in part.pieces:
                piece.register_forward_hook(press)
        result = search(pool, journal=tmp_path / str(number), progress=recorder)
        stopped.append(result.stopped)
        assert records(search(new_pool(), journal=tmp_path / str(number))) == records(uninterrupted)
    assert stopped[:3] == ["interrupted"] * 3


def test_ctrl_c_while_ranking_ends_the_search_and_the_journal_has_what_was_run(
    tmp_path: Path, uninterrupted: SearchResult
) -> None:
    def pressed(candidates: Sequence[Candidate], data: SelectionData) -> list[dict[str, float]]:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        search(new_pool(), ranking=pressed, journal=tmp_path)
    pool = new_pool()
    with pieces_run(pool) as ran:
        assert records(search(pool, journal=tmp_path)) == records(uninterrupted)
    assert ran == []


def test_a_search_that_ran_out_of_time_goes_on_to_the_same_result(
    tmp_path: Path, seconds: Clock, uninterrupted: SearchResult
) -> None:
    for limit in (5, 15, 25):
        seconds.now = 0
        assert search(new_pool(), time_limit=limit, journal=tmp_path).stopped == "time limit"
    result = search(new_pool(), time_limit=1e9, journal=tmp_path)
    assert result.stopped is None
    assert records(result) == records(uninterrupted)


# Every search runs in a child of its own, of a process that has computed with one thread only. Once its journal has
# some length it is killed some calls and returns of Python functions later, wherever that is: while it composes, ranks,
# or writes the journal.
KILLED = """
import json, os, random, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from doubles.journals import answers
from doubles.pair_searches import new_pool, search
from doubles.pools import records
from lightning_stitch.io.journal import Journal

os.chdir(sys.argv[1])
pool = new_pool()

def child(journal, after=None, more=0):
    asked, left, recall_all = 0, more, Journal.recall_all
    def counted(*arguments):
        nonlocal asked
        found = recall_all(*arguments)
        asked += 1
        return found
    def event(*_):
        nonlocal left
        if asked >= after:
            left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    pid = os.fork()
    if pid == 0:
        Journal.recall_all = counted
        if after is not None:
            sys.setprofile(event)
        result = search(pool, journal=journal)
        sys.setprofile(None)
        with open(journal + ".json", "w") as file:
            json.dump([records(result), result.rejected, asked], file)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, [kind for _, kind, _ in answers(Path(journal))]

code, kinds = child("alone")
assert code == 0
*_, asked = json.load(open("alone.json"))
chance, left = random.Random(0), []
for after in range(1, asked, 2):
    code, kinds = child("killed", after=after, more=chance.randrange(300))
    assert code == -signal.SIGKILL, code
    left.append(kinds)
code, kinds = child("killed")
assert code == 0
same = open("alone.json").read() == open("killed.json").read()
print(json.dumps({"same": same, "left": left, "ranked": len(json.load(open("alone.json"))[0])}))
"""


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_with_the_same_result(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["same"]
    assert found["ranked"] > 12
    # It was killed while it composed and while it ranked, and each time went on where it was.
    lengths = [len(kinds) for kinds in found["left"]]
    assert len(lengths) >= 10
    assert lengths == sorted(lengths)
    assert len({kinds.count("stitch") for kinds in found["left"]}) > 3
    features = {kinds.count("tap") for kinds in found["left"]}
    # Those of a batch are recorded together.
    assert features & {0}
    assert features & {found["ranked"], 2 * found["ranked"]}
    assert features <= {batches * found["ranked"] for batches in range(4)}
