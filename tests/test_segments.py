from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest
import torch
from helpers import donor, live, noise, path, plain, shake, space_of
from torch import nn

from lightning_stitch.cost import Budget, Cost, network_cost
from lightning_stitch.errors import BudgetError, CutError, StitchError
from lightning_stitch.network import assemble
from lightning_stitch.paths import references
from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec
from lightning_stitch.search import DepthFirst
from lightning_stitch.segments import CalibrationSettings, CompositionCosts, Segmented, chunks, segment
from lightning_stitch.sources import Source
from lightning_stitch.stitches import is_bridgeable

Path = list[tuple[int, int, int]]  # source, first piece, last piece + 1
IMAGES = noise(6, 3, 64, 64)
MEASURES: list[Literal["params", "macs"]] = ["params", "macs"]


def featureless(part: Segmented) -> nn.Module:
    """The source's network without its classifier, as timm itself takes it off."""
    network = copy.deepcopy(part.source.module)
    network.reset_classifier(0)  # type: ignore[operator]
    return network


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("granularity", ["blocks", "all"])
def test_the_pieces_in_a_row_are_the_source_up_to_its_features(
    name: str, granularity: Literal["blocks", "all"]
) -> None:
    part = segment(donor(name), CalibrationSettings(granularity=granularity), (3, 64, 64))
    network = featureless(part)
    assert len(part.pieces) == len(part.cuts) + 1 > 1
    with torch.no_grad():
        x = part.preprocess(IMAGES)
        expected = network(x)
        for piece in part.pieces:
            x = piece(x)
    assert torch.equal(x, expected)
    assert part.cost == network_cost(network, (3, 64, 64))
    assert part.cost == sum(part.costs, Cost(0, 0))
    assert part.cost_between(0, 1) + part.cost_between(1, len(part.pieces)) == part.cost
    assert part.name == name


def test_batches_are_run_in_portions_that_make_them_up() -> None:
    portions = chunks(IMAGES, 4)
    assert [len(portion) for portion in portions] == [4, 2]
    assert torch.equal(torch.cat(list(portions)), IMAGES)
    few, many = (
        segment(donor("test_resnet"), CalibrationSettings(), (3, size, size)).images_at_once for size in (512, 64)
    )
    assert 1 <= few < many


def test_pieces_share_the_sources_parameters() -> None:
    part = segment(donor("test_resnet"), CalibrationSettings(until="output"), (3, 64, 64))
    own = {id(parameter) for parameter in part.source.module.parameters()}
    assert {id(parameter) for piece in part.pieces for parameter in piece.parameters()} == own


def test_pieces_until_the_output_end_in_the_sources_own_classes() -> None:
    part = segment(donor("test_resnet"), CalibrationSettings(until="output"), (3, 64, 64))
    with torch.no_grad():
        x = part.preprocess(IMAGES)
        expected = part.source.module(x)
        for piece in part.pieces:
            x = piece(x)
    assert torch.equal(x, expected)
    assert part.end is None
    assert part.cost == network_cost(part.source.module, (3, 64, 64))
    assert part.cuts[-1].format == "vector"


def test_granularity_may_be_each_sources_own() -> None:
    settings = CalibrationSettings(granularity={"a": ["1"], "b": "all"})
    cuts = {
        name: [cut.name for cut in segment(plain(name, (4, 5, 6), seed=0), settings, (3, 16, 16)).cuts]
        for name in ("a", "b", "c")
    }
    assert cuts == {"a": ["1"], "b": ["0.0", "0", "1.0", "1"], "c": ["0", "1"]}


def test_cuts_with_nothing_to_compute_between_them_and_the_features_are_left_out() -> None:
    part = segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity="all"), (3, 16, 16))
    assert part.end == "2"
    assert [cut.name for cut in part.cuts] == ["0.0", "0", "1.0", "1"]


def test_a_source_of_fixed_size_is_cut_at_its_own_size() -> None:
    part = segment(live(nn.Sequential(*plain("a", (4, 5, 6), seed=0).module), "a", fixed_size=True), *small())
    assert part.graph.input_size == (3, 16, 16)
    assert part.image_shape == (3, 8, 8)
    assert part.preprocess(noise(2, 3, 8, 8)).shape == (2, 3, 16, 16)


def small() -> tuple[CalibrationSettings, tuple[int, int, int]]:
    return CalibrationSettings(granularity={"narrow": ["0", "1"]}), (3, 8, 8)


def test_a_source_that_takes_no_other_size_names_the_sizes_and_the_mend() -> None:
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 8), nn.ReLU(), nn.Linear(8, 2)]
    source = live(nn.Sequential(*layers), "flat", size=16)
    assert segment(source, CalibrationSettings(), (3, 16, 16)).graph.input_size == (3, 16, 16)
    words = r"(?s)^Source 'flat' at 3x24x24: .*It does take its native 3x16x16: use images .* fixed_size=True"
    with pytest.raises(CutError, match=words):
        segment(source, CalibrationSettings(), (3, 24, 24))
    mended = live(nn.Sequential(*layers), "flat", size=16, fixed_size=True)
    assert segment(mended, CalibrationSettings(), (3, 24, 24)).graph.input_size == (3, 16, 16)


@pytest.mark.parametrize("fixed_size", [False, True])
def test_images_of_other_channels_are_refused(fixed_size: bool) -> None:
    source = live(plain("a", (4, 5, 6), seed=0).module, "grey?", fixed_size=fixed_size)
    with pytest.raises(CutError, match="'grey\\?' takes images of 3 channels; the calibration images have 1"):
        segment(source, CalibrationSettings(), (1, 16, 16))


def test_what_cannot_be_cut_says_the_source_and_the_size() -> None:
    unpadded = live(nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "deep")
    with pytest.raises(CutError, match=r"Source 'deep' at 3x8x8: .*fails in a dry run"):
        segment(unpadded, *small())
    with pytest.raises(CutError, match="Source 'a' at 3x16x16: No cut is named 'layer9'"):
        segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity=("layer9",)), (3, 16, 16))
    maps = live(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), "maps")
    with pytest.raises(CutError, match=r"Source 'maps' .*no feature vector"):
        segment(maps, CalibrationSettings(), (3, 16, 16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"until": "logits"}, "until must be 'features' or 'output'; found 'logits'"),
        ({"estimator": "unbiased"}, r"estimator must be one of \('debiased', 'biased'\); found 'unbiased'"),
        ({"rows_per_image": 0}, "rows_per_image must be at least 1; found 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        CalibrationSettings(**settings)  # type: ignore[arg-type]


def bottlenecks(widths: Sequence[int], *, seed: int) -> nn.Module:
    """Convolutions and BatchNorms into which stitches fold, some at less than no cost."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, (1, 2, 2), strict=False):
        layers += [nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))]
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
            find = costs.stitch_after_fold if taken and cut - fragments[index - 1][1] == 1 else costs.stitch
            specs.append(find(sender, cut - 1, s, first - 1)[0])
            taken = specs[-1].placement == "consumer"
    recipe = Recipe(sources=tuple(part.source.ref for part in parts), fragments=tuple(refs), stitches=tuple(specs))
    network = assemble(recipe, {part.name: part.graph for part in parts}, [None] * len(specs))
    return network_cost(network, parts[0].image_shape), specs


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bias", [True, False])
def test_stitches_cost_what_the_assembled_networks_have(pool: str, bias: bool) -> None:
    parts = [segment(source, *small()) for source in POOLS[pool]()]
    costs = CompositionCosts(parts, bias=bias, max_fragments=3)
    placements = set()
    for fragments in compositions(parts, 3):
        expected, specs = real_cost(parts, costs, fragments)
        placements |= {spec.placement for spec in specs}
        total = Cost(0, 0)
        for index, (s, first, last) in enumerate(fragments):
            total = total + parts[s].cost_between(first, last)
            if index:
                sender, begun, cut = fragments[index - 1]
                taken = index > 1 and specs[index - 2].placement == "consumer" and cut - begun == 1
                find = costs.stitch_after_fold if taken else costs.stitch
                total = total + find(sender, cut - 1, s, first - 1)[1]
        assert total == expected
    assert ("producer" in placements) == (pool == "folded")
    assert ("consumer" in placements) == (not bias)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("longest", [2, 3, 4])
def test_the_cheapest_composition_is_that_of_trying_all(pool: str, longest: int) -> None:
    parts = [segment(source, *small()) for source in POOLS[pool]()]
    costs = CompositionCosts(parts, bias=True, max_fragments=longest)
    chains = [[(s, i, i + 1) for i in range(len(part.pieces))] for s, part in enumerate(parts)]
    every = [(str(p), real_cost(parts, costs, p)[0]) for p in [*compositions(parts, longest), *chains]]
    for measure in MEASURES:
        least, words = costs.cheapest(measure)
        assert least == min(getattr(cost, measure) for _, cost in every)
        cheapest = [fragments for fragments, cost in every if getattr(cost, measure) == least]
        for index, part in enumerate(parts):
            assert (part.name in words) == any(f"({index}," in fragments for fragments in cheapest)
        if pool == "detour" and longest > 2:
            assert least < CompositionCosts(parts, bias=True, max_fragments=2).cheapest(measure)[0]
        costs.check(Budget(**{f"max_{measure}": least}))
        limit, unit = least - 1, "parameters" if measure == "params" else "MACs"
        told = rf"most {limit / 1e6:.12g} M {unit}: the cheapest composition has {least / 1e6:.12g} M \({words}\)"
        with pytest.raises(BudgetError, match=told):
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


@pytest.mark.parametrize("limit", ["max_params", "max_macs"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_bounds_turn_down_nothing_that_keeps_the_budget(limit: str, share: float) -> None:
    images = noise(8, 3, 8, 8)
    sources = POOLS["folded"]()
    parts = [segment(source, *small()) for source in sources]
    costs = CompositionCosts(parts, bias=True, max_fragments=4)
    chains = [[(s, i, i + 1) for i in range(len(part.pieces))] for s, part in enumerate(parts)]
    every = [p for p in compositions(parts, 4, single=True) if len(p) > 1 and p not in chains]
    prices = {str(p): getattr(real_cost(parts, costs, p)[0], limit.removeprefix("max_")) for p in every}
    most = sorted(prices.values())[int(share * len(prices))]
    space = space_of(sources, images, budget=Budget(**{limit: most}), max_fragments=4)
    strategy = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=4)
    found = [str([(s.source, s.first, s.last) for s in candidate.steps]) for candidate in strategy(space)]
    assert sorted(found) == sorted(fragments for fragments, price in prices.items() if price <= most)
    assert space.rejected["over the budget"] > 0


def test_a_source_without_cuts_still_stands_for_itself() -> None:
    parts = [segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity=("2",)), (3, 8, 8))]
    assert parts[0].cuts == []
    costs = CompositionCosts(parts, bias=True, max_fragments=3)
    assert costs.cheapest("macs") == (parts[0].cost.macs, "a as it is")
    space = space_of([parts[0].source], noise(4, 3, 8, 8), settings=CalibrationSettings(granularity=("2",)))
    assert list(DepthFirst()(space)) == []
    assert path(references(space)[0]) == [("a", None, "2")]
