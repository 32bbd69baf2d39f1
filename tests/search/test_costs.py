from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import pytest
from doubles.pools import path, references, space_of
from doubles.references import sums_of
from doubles.small_sources import live, plain, shake
from doubles.tensors import noise
from torch import nn

from lightning_stitch.cost import Budget, Cost
from lightning_stitch.errors import BudgetError
from lightning_stitch.networks.network import assemble
from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.search.strategies import DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.segments import Segmented, segment
from lightning_stitch.stitching.stitches import is_bridgeable

Path = list[tuple[int, int, int]]  # source, first piece, last piece + 1


def small() -> tuple[CalibrationSettings, tuple[int, int, int]]:
    return CalibrationSettings(granularity={"narrow": ["0", "1"]}), (3, 8, 8)


def bottlenecks(widths: Sequence[int], *, seed: int, strides: Sequence[int] = (1, 2, 2), kernel: int = 3) -> nn.Module:
    """Convolutions and BatchNorms into which stitches fold, some at less than no cost."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, strides, strict=False):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(outputs))]
    return shake(
        nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4)), seed
    )


def detour() -> list[Source]:
    """Sources of which the cheapest network takes a narrow piece of one between two pieces of the other."""

    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())

    def source(name: str, *layers: nn.Module, features: int) -> Source:
        head = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(features, 4)]
        return live(shake(nn.Sequential(*layers, *head), 0), name)

    wide = source("wide", conv(3, 32), conv(32, 32), conv(32, 4), features=4)
    dear = nn.Sequential(conv(3, 64), conv(64, 2))
    narrow = source("narrow", dear, conv(2, 2), nn.Sequential(conv(2, 64), conv(64, 64)), features=64)
    return [wide, narrow]


POOLS = {
    "detour": detour,
    "plain": lambda: [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))],
    "folded": lambda: [live(bottlenecks((4, 9, 8), seed=0), "a"), live(bottlenecks((6, 5, 7), seed=1), "b")],
    # A stitch folds into what is behind it, bias or not, where a piece is then entered by fewer channels than its own.
    "pointwise": lambda: [
        live(bottlenecks((5, 30, 6), seed=0, strides=(1, 1, 1), kernel=1), "a"),
        live(bottlenecks((6, 26, 4), seed=1, strides=(1, 1, 1), kernel=1), "b"),
    ],
}


def compositions(parts: Sequence[Segmented], longest: int, *, single: bool = False) -> Iterator[Path]:
    """Every composition in which no fragment is used twice."""

    def extend(done: Path) -> Iterator[Path]:
        used = {(s, piece) for s, first, last in done for piece in range(first, last)}
        source, _, last = done[-1]
        if last == len(parts[source].pieces):
            yield done
            return
        if len(done) == longest:
            return
        for s, part in enumerate(parts):
            for r, cut in enumerate(part.cuts):
                ends = [r + 2] if single else range(r + 2, len(part.pieces) + 1)
                for end in ends:
                    new = {(s, piece) for piece in range(r + 1, end)}
                    if is_bridgeable(parts[source].cuts[last - 1], cut) and not used & new:
                        yield from extend([*done, (s, r + 1, end)])

    for s, part in enumerate(parts):
        for end in [1] if single else range(1, len(part.pieces) + 1):
            yield from extend([(s, 0, end)])


def real_cost(parts: Sequence[Segmented], costs: CompositionCosts, fragments: Path) -> tuple[Cost, list[StitchSpec]]:
    """What the assembled network of a path has, counted in the network itself."""
    refs, specs = [], []
    taken = False
    for index, (s, first, last) in enumerate(fragments):
        names = [None, *(cut.name for cut in parts[s].cuts), parts[s].end]
        refs.append(FragmentRef(parts[s].name, names[first], names[last]))
        if index:
            sender, _, cut = fragments[index - 1]
            before_taken = taken and cut - fragments[index - 1][1] == 1
            specs.append(costs.stitch(sender, cut - 1, s, first - 1, before_taken=before_taken).spec)
            taken = specs[-1].placement == "consumer"
    last_source, _, last_piece = fragments[-1]
    recipe = Recipe.chain(
        [part.source.ref for part in parts],
        refs,
        specs,
        num_features=parts[last_source].width_at(last_piece),
        input_size=parts[0].image_shape,
    )
    network = assemble(recipe, {part.name: part.graph for part in parts})
    return sums_of(network, parts[0].image_shape), specs


@cache
def parts_of(pool: str) -> list[Segmented]:
    return [segment(source, *small()) for source in POOLS[pool]()]


@cache
def cost_in(pool: str, bias: bool, fragments: tuple[tuple[int, int, int], ...]) -> tuple[Cost, list[StitchSpec]]:
    """`real_cost` of a path in one of the pools, counted once for all tests."""
    costs = CompositionCosts(parts_of(pool), bias=bias, max_fragments=len(fragments))
    return real_cost(parts_of(pool), costs, list(fragments))


def counted_cost(costs: CompositionCosts, fragments: Path, specs: list[StitchSpec]) -> Cost:
    """The same from the costs of runs and stitches."""
    total = Cost(0, 0)
    for index, (s, first, last) in enumerate(fragments):
        total = total + costs.run(s, first, last)
        if index < len(specs):
            taken = index > 0 and specs[index - 1].placement == "consumer" and last - first == 1
            receiver, entry, _ = fragments[index + 1]
            total = total + costs.stitch(s, last - 1, receiver, entry - 1, before_taken=taken).cost
    return total


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bias", [True, False])
def test_stitches_cost_what_the_assembled_networks_have(pool: str, bias: bool) -> None:
    parts = parts_of(pool)
    costs = CompositionCosts(parts, bias=bias, max_fragments=3)
    placements = set()
    for fragments in compositions(parts, 3):
        expected, specs = cost_in(pool, bias, tuple(fragments))
        placements |= {spec.placement for spec in specs}
        assert counted_cost(costs, fragments, specs) == expected
    assert ("producer" in placements) == (pool not in ("plain", "detour"))
    assert ("consumer" in placements) == (not bias or pool == "pointwise")


MEASURES = {"params": "M parameters", "macs": "M MACs"}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("longest", [2, 3, 4])
def test_the_cheapest_composition_is_that_of_trying_all(pool: str, longest: int) -> None:
    parts = parts_of(pool)
    costs = CompositionCosts(parts, bias=True, max_fragments=longest)
    chains = [[(s, i, i + 1) for i in range(len(part.pieces))] for s, part in enumerate(parts)]
    every = [(str(p), cost_in(pool, True, tuple(p))[0]) for p in [*compositions(parts, longest), *chains]]
    for measure, unit in MEASURES.items():
        least, words = costs.cheapest(measure)
        lowest = min(getattr(cost, measure) for _, cost in every)
        assert least == lowest
        cheapest = [fragments for fragments, cost in every if getattr(cost, measure) == least]
        for index, part in enumerate(parts):
            assert (part.name in words) == any(f"({index}," in fragments for fragments in cheapest)
        if pool == "detour" and longest > 2:
            assert least < CompositionCosts(parts, bias=True, max_fragments=2).cheapest(measure)[0]
        costs.check(Budget(**{f"max_{measure}": least}))
        limit = least - 1
        told = f"{limit / 1e6:.12g} {unit}: the cheapest composition has {least / 1e6:.12g} {unit.split()[0]} ({words})"
        with pytest.raises(BudgetError, match=re.escape(f"at most {told}")):
            costs.check(Budget(**{f"max_{measure}": limit}))


def test_a_source_stitched_to_itself_may_be_the_cheapest() -> None:
    parts = [segment(POOLS["folded"]()[0], CalibrationSettings(granularity=("0", "1")), (3, 16, 16))]
    costs = CompositionCosts(parts, bias=True, max_fragments=2)
    expected, specs = real_cost(parts, costs, [(0, 0, 1), (0, 1, 2), (0, 2, 3)])
    assert [spec.placement for spec in specs] == ["producer", "producer"]
    assert costs.self_stitched(0) == expected
    assert expected.params < parts[0].cost.params
    limits = [(0, 0, 1), (0, 2, 3)]
    assert costs.cheapest("params")[0] == min(expected.params, real_cost(parts, costs, limits)[0].params)


def test_a_layer_that_took_the_stitch_before_it_does_not_take_the_one_behind() -> None:
    layers = [nn.Sequential(nn.Conv2d(a, 4, k, padding=k // 2), nn.BatchNorm2d(4)) for a, k in ((3, 3), (4, 1), (4, 3))]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    source = live(shake(nn.Sequential(*layers, *head), 0), "net")
    parts = [segment(source, CalibrationSettings(granularity=("0", "1")), (3, 8, 8))]
    costs = CompositionCosts(parts, bias=True, max_fragments=3)
    expected, specs = real_cost(parts, costs, [(0, 0, 1), (0, 1, 2), (0, 2, 3)])
    assert costs.stitch(0, 1, 0, 1)[0].placement == "producer"
    assert [spec.placement for spec in specs] == ["consumer", "explicit"]
    assert costs.self_stitched(0) == expected


@cache
def chains_of(pool: str, longest: int) -> tuple[list[Source], dict[str, Cost]]:
    """Sources, and what each composition of single pieces costs, counted in the assembled network."""
    parts = parts_of(pool)
    own = [[(s, i, i + 1) for i in range(len(part.pieces))] for s, part in enumerate(parts)]
    every = [p for p in compositions(parts, longest, single=True) if len(p) > 1 and p not in own]
    return [part.source for part in parts], {str(p): cost_in(pool, True, tuple(p))[0] for p in every}


def found_in(space: SearchSpace, longest: int) -> list[str]:
    """The same compositions, as far as an exhaustive search finds them."""
    strategy = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=longest)
    return sorted(str([(s.source, s.first, s.last) for s in candidate.steps]) for candidate in strategy(space))


@pytest.mark.parametrize("pool", ["folded", "pointwise"])
@pytest.mark.parametrize("seed", range(8))
def test_a_search_finds_all_that_keep_its_limits_and_nothing_else(pool: str, seed: int) -> None:
    sources, prices = chains_of(pool, 4)
    draw = random.Random(seed)
    limits = {}
    for measure in draw.sample(sorted(MEASURES), seed % 2 + 1):
        values = sorted({getattr(cost, measure) for cost in prices.values()})
        limits[f"max_{measure}"] = draw.choice(values[:-1] or values)
    space = space_of(sources, noise(8, 3, 8, 8), budget=Budget(**limits), max_fragments=4)
    expected = [
        fragments
        for fragments, cost in prices.items()
        if all(getattr(cost, limit.removeprefix("max_")) <= most for limit, most in limits.items())
    ]
    assert found_in(space, 4) == sorted(expected)
    assert len(expected) < len(prices)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_an_estimated_latency_is_that_of_pieces_and_added_work_and_may_exceed_its_limit_by_a_quarter(
    share: float,
) -> None:
    sources, _ = chains_of("folded", 3)
    parts = [segment(source, *small()) for source in sources]
    costs = CompositionCosts(parts, bias=True, max_fragments=3)
    times = [[3.0, 1.0, 0.5], [2.0, 0.25, 4.0]]
    per_mac = min(sum(own) / part.cost.macs for own, part in zip(times, parts, strict=True))
    estimates, saved = {}, 0
    for fragments in compositions(parts, 3, single=True):
        pairs = [((s, cut - 1), (t, entry - 1)) for (s, _, cut), (t, entry, _) in pairwise(fragments)]
        added = [costs.stitch(*leaves, *enters).cost.macs for leaves, enters in pairs]
        work = sum(max(macs, 0) for macs in added)
        estimates[str(fragments)] = sum(times[s][first] for s, first, _ in fragments) + work * per_mac
        saved += sum(macs < 0 for macs in added)
    assert saved > 0
    limit = sorted(estimates.values())[int(share * len(estimates))] / 1.25 + 1e-9
    space = space_of(sources, noise(8, 3, 8, 8), budget=Budget(max_latency_ms=limit), max_fragments=3)
    # Whether priced before or after, a stitch has the same estimate.
    space.costs.check(Budget(max_macs=1e9))
    space.costs.time(times)
    strategy = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=3)
    found = {str([(s.source, s.first, s.last) for s in c.steps]): c.cost.latency_ms for c in strategy(space)}
    own = {str([(s, i, i + 1) for i in range(len(part.pieces))]) for s, part in enumerate(parts)}
    expected = {fragments: ms for fragments, ms in estimates.items() if ms <= 1.25 * limit and fragments not in own}
    assert found == pytest.approx(expected)
    assert 0 < len(expected) < len(estimates)


def test_activation_bytes_are_checked_against_the_image_alone() -> None:
    costs = CompositionCosts([segment(source, *small()) for source in POOLS["plain"]()], bias=True, max_fragments=2)
    costs.check(Budget(max_activation_bytes=4 * 3 * 8 * 8))
    told = "the cheapest composition has at least 0.000768 MB (the image alone). Raise the budget"
    with pytest.raises(BudgetError, match=re.escape(told)):
        costs.check(Budget(max_activation_bytes=4 * 3 * 8 * 8 - 1))


def test_a_latency_that_no_composition_can_have_names_the_fastest() -> None:
    parts = [segment(source, *small()) for source in POOLS["plain"]()]
    costs = CompositionCosts(parts, bias=True, max_fragments=2)
    costs.check(Budget(max_latency_ms=1e-9))
    costs.time([[8.0] * len(part.pieces) for part in parts])
    least, words = costs.cheapest("latency_ms")
    assert 16 < least < 17  # two pieces and a stitch
    costs.check(Budget(max_latency_ms=least / 1.25 + 1e-9))
    told = f"of at most 12 ms for one image: the cheapest composition has by estimate {least:.12g} ms ({words})"
    with pytest.raises(BudgetError, match=re.escape(told)):
        costs.check(Budget(max_latency_ms=12))


def test_a_source_without_cuts_still_stands_for_itself() -> None:
    parts = [segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity=("2",)), (3, 8, 8))]
    assert parts[0].cuts == []
    costs = CompositionCosts(parts, bias=True, max_fragments=3)
    assert costs.cheapest("macs") == (parts[0].cost.macs, "a as it is")
    space = space_of([parts[0].source], noise(4, 3, 8, 8), settings=CalibrationSettings(granularity=("2",)))
    assert list(DepthFirst()(space)) == []
    assert path(references(space)[0]) == [("a", None, "2")]
