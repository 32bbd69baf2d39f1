from __future__ import annotations

from collections import Counter

import pytest
from doubles.pools import space_of
from doubles.small_sources import plain
from doubles.tensors import digits, noise

from lightning_stitch.search.space import Edge, SearchSpace, State
from lightning_stitch.settings import CalibrationSettings

IMAGES = 0.7 * digits(12, 8)[0] + 0.3 * noise(12, 3, 8, 8)
FEW_ROWS = CalibrationSettings(granularity="all", rows_per_image=8)  # no more than a shortlist compares
EVERYTHING = {"min_cka": -9.0, "min_product": -9.0}


def spaces() -> tuple[SearchSpace, SearchSpace]:
    """One that scores all receivers, and one that scores two of each grid and class."""
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
    full = space_of(sources, IMAGES, settings=FEW_ROWS)
    return full, SearchSpace(full.sources, FEW_ROWS, costs=full.costs, shortlist=2)


def scored(space: SearchSpace, state: State, **options: object) -> list[list[Edge]]:
    return [space.edges(state, cut, x, **EVERYTHING, **options) for cut, x in space.walk(state)]  # type: ignore[arg-type]


def place(edge: Edge) -> tuple[int, int]:
    return edge.source, edge.receiver


@pytest.mark.parametrize("classes", [1, 3])
def test_a_shortlist_scores_the_nearest_of_every_grid_and_class_exactly(classes: int) -> None:
    full, short = spaces()

    def size_class(macs: int) -> int:
        return sum(macs <= share * full.cheapest_source.macs for share in (1.0, 0.5)[: classes - 1])

    dropped = 0
    for state in full.starts():
        for every, few in zip(scored(full, state), scored(short, state, size_class=size_class), strict=True):
            groups: dict[tuple[object, int], list[Edge]] = {}
            for edge in every:
                grid = full.sources[edge.source].parts.cuts[edge.receiver].grid
                # Without the stitch, whose cost is not known before it is chosen.
                rest = full.costs.run(edge.source, edge.receiver + 1, len(full.sources[edge.source].parts.pieces)).macs
                kind = size_class(full.costs.run(edge.state.source, 0, edge.cut + 1).macs + rest)
                groups.setdefault((grid, kind), []).append(edge)
            sizes = Counter(grid for grid, kind in groups for _ in groups[grid, kind])
            wanted = []
            for (grid, _), edges in groups.items():
                best = sorted(edges, key=lambda edge: -edge.cka)
                wanted += best[:2] if sizes[grid] > 2 else best
            exact = {place(edge): edge.cka for edge in wanted}
            assert {place(edge): edge.cka for edge in few} == pytest.approx(exact, abs=1e-6)
            dropped += len(every) - len(few)
    assert short.rejected["behind others on the shortlist"] == dropped > 0


def test_where_few_receivers_are_in_question_all_are_scored() -> None:
    full, _ = spaces()
    longer = SearchSpace(full.sources, FEW_ROWS, costs=full.costs, shortlist=99)
    for state in full.starts():
        assert [list(map(place, edges)) for edges in scored(longer, state)] == [
            list(map(place, edges)) for edges in scored(full, state)
        ]
    assert longer.rejected["behind others on the shortlist"] == 0
