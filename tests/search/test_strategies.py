from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from doubles.outcomes import assembled, run_all
from doubles.pools import path, references, space_of
from doubles.small_sources import donor, images_seen, plain
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch.cost import Budget
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import StitchError
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.search.strategies import Beam, DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

IMAGES = 0.7 * digits(12, 8)[0] + 0.3 * noise(12, 3, 8, 8)
PAPER = CalibrationSettings(granularity="reference", estimator="biased", rows_per_image=256, until="output")
EVERYTHING = {"threshold": -9.0, "edge_threshold": -9.0, "span": 99}
Fragments = list[tuple[str, int]]


def pair() -> list[Source]:
    return [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]


def paper_space(**options: object) -> SearchSpace:
    return space_of(pair(), IMAGES, settings=PAPER, bias=False, ridge=0.0, **options)  # type: ignore[arg-type]


def network_of(space: SearchSpace, candidate: Candidate) -> nn.Module:
    return assembled(candidate, [source.parts for source in space.sources])


def recipes(candidates: list[Candidate]) -> list[dict[str, object]]:
    return [candidate.recipe.to_dict() for candidate in candidates]


def naive_depth_first(
    nets: dict[str, nn.Sequential], images: Tensor, *, span: int, threshold: float, edge_threshold: float, longest: int
) -> Iterator[tuple[Fragments, list[float], float, Tensor]]:
    """The paper's procedure word for word: biased CKA on Gram matrices, Y' pinv(X'), in float64."""
    originals: dict[tuple[str, int], Tensor] = {}
    for name, net in nets.items():
        x = net[0](images)
        for index in range(1, len(net)):
            originals[name, index] = x
            x = net[index](x)

    def aligned(x: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 4:
            options = {"mode": "bilinear", "align_corners": False, "antialias": True}
            return nn.functional.interpolate(x, like.shape[2:], **options) if x.shape[2:] != like.shape[2:] else x
        return x.mean((2, 3)) if x.ndim == 4 else x

    def rows(x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.ndim == 4 else x).double()

    def cka(x: Tensor, y: Tensor) -> float:
        h = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
        kx, ky = h @ x @ x.T @ h, h @ y @ y.T @ h
        return float((kx * ky).sum() / (kx.norm() * ky.norm()))

    def extend(used: Fragments, x: Tensor, ckas: list[float]) -> Iterator[tuple[Fragments, list[float], float, Tensor]]:
        scored = []
        for place, ((name, index), y) in enumerate(originals.items()):
            is_end = index == len(nets[name]) - 1
            if (x.ndim, y.ndim) == (2, 4) or (name, index) in used or (len(used) == longest - 1 and not is_end):
                continue
            score = cka(rows(aligned(x, y)), rows(y))
            if score > edge_threshold and float(np.prod([*ckas, score])) >= threshold:
                scored.append((-score, place, name, index))
        for negative, _, name, index in sorted(scored)[:span]:
            y = originals[name, index]
            x_aligned = aligned(x, y)
            a = rows(y).T @ torch.linalg.pinv(rows(x_aligned).T)
            entered = torch.einsum("oc,bc...->bo...", a, x_aligned.double()).float()
            onward = nets[name][index](entered)
            fragments, chain = [*used, (name, index)], [*ckas, -negative]
            if index < len(nets[name]) - 1:
                yield from extend(fragments, onward, chain)
            elif len({source for source, _ in fragments}) > 1 or len(fragments) < len(nets[name]):
                # What is left out is a source stitched to itself throughout.
                yield fragments, chain, float(np.prod(chain)), onward

    for name, net in nets.items():
        yield from extend([(name, 0)], net[0](images), [])


@pytest.mark.parametrize(
    ("span", "threshold", "edge_threshold", "longest"),
    [(2, 0.5, 0.5, 16), (2, 0.0, 0.0, 16), (3, 0.4, 0.3, 4), (1, 0.2, 0.2, 3), (9, 0.0, 0.0, 3)],
)
def test_depth_first_is_the_papers_procedure(span: int, threshold: float, edge_threshold: float, longest: int) -> None:
    sources = pair()
    space = space_of(sources, IMAGES, settings=PAPER, bias=False, ridge=0.0)
    strategy = DepthFirst(span=span, threshold=threshold, edge_threshold=edge_threshold, max_fragments=longest)
    found = list(strategy(space))
    with torch.no_grad():
        nets = {source.name: source.module for source in sources}
        expected = list(
            naive_depth_first(
                nets,  # type: ignore[arg-type]
                (IMAGES - 0.4) / 0.3,
                span=span,
                threshold=threshold,
                edge_threshold=edge_threshold,
                longest=longest,
            )
        )
    assert len(expected) > 1
    assert [[(space.sources[s.source].name, s.first) for s in c.steps] for c in found] == [e[0] for e in expected]
    outcomes = run_all(found, [source.parts for source in space.sources], [IMAGES])
    for candidate, outcome, (_, ckas, product, features) in zip(found, outcomes, expected, strict=True):
        assert [stitch and stitch.cka for stitch in candidate.recipe.stitches] == pytest.approx(ckas, abs=1e-6)
        assert candidate.cka_product == pytest.approx(product, abs=1e-6)
        torch.testing.assert_close(outcome.features, features, rtol=1e-3, atol=1e-4 * float(features.abs().max()))


def test_depth_first_without_limits_gives_every_composition_once() -> None:
    cuts = {"a": ["0.0", "0", "1"], "b": ["0", "2"]}
    space = space_of(pair(), IMAGES, settings=replace(PAPER, granularity=cuts), max_fragments=4)
    found = [path(c) for c in DepthFirst(max_fragments=4, **EVERYTHING)(space)]
    pieces = {name: [(name, *ends) for ends in pairwise([None, *names, None])] for name, names in cuts.items()}
    entries = [*pieces["a"][1:], *pieces["b"][1:]]

    def extend(done: list[tuple[str, str | None, str | None]]) -> Iterator[str]:
        if done[-1][2] is None:
            yield str(done)
        elif len(done) < 4:
            for piece in entries:
                # The cut "2" is a vector, which does not become a map.
                if piece not in done and (done[-1][2] != "2" or piece[1] == "2"):
                    yield from extend([*done, piece])

    expected = {one for name in "ab" for one in extend(pieces[name][:1])} - {str(own) for own in pieces.values()}
    assert len(expected) > 20
    assert any(str(pieces["a"][2]) + ", " + str(pieces["a"][1]) in one for one in expected)
    assert sorted(map(str, found)) == sorted(expected)


def test_depth_first_keeps_its_limits() -> None:
    free = list(DepthFirst(**EVERYTHING)(paper_space()))
    for limits in ({"max_fragments": 3}, {"threshold": 0.3}, {"edge_threshold": 0.3}, {"span": 2}):
        found = list(DepthFirst(**{**EVERYTHING, **limits})(paper_space()))  # type: ignore[arg-type]
        assert 0 < len(found) < len(free)
        assert all(len(c.steps) <= limits.get("max_fragments", 99) for c in found)
        assert all(c.cka_product >= limits.get("threshold", -9) for c in found)
        assert all(s.cka >= limits.get("edge_threshold", -9) for c in found for s in c.recipe.stitches if s)
        followed: dict[str, set[str]] = {}
        for fragments in map(path, found):
            for depth in range(1, len(fragments)):
                followed.setdefault(str(fragments[:depth]), set()).add(str(fragments[depth]))
        assert max(map(len, followed.values())) <= limits.get("span", 99)
    some = list(DepthFirst(max_networks=3, **EVERYTHING)(paper_space()))
    assert recipes(some) == recipes(free[:3])


def test_sample_mode_follows_one_path_by_its_seed() -> None:
    space = paper_space()
    everything = [path(c) for c in DepthFirst(span=3, threshold=0, edge_threshold=0)(space)]
    sampled = {}
    for seed in range(12):
        strategy = DepthFirst(span=3, threshold=0, edge_threshold=0, sample=True, seed=seed)
        found, again = ([path(c) for c in strategy(space)] for _ in range(2))
        assert found == again
        assert len(found) <= 1
        sampled[seed] = found
        assert all(one in everything for one in found)
    assert len({str(found) for found in sampled.values()}) > 3


def test_beam_goes_level_by_level_and_keeps_few_unlike_stitches_of_each_size() -> None:
    space = space_of(pair(), IMAGES, settings=replace(PAPER, granularity="all"), max_fragments=4)
    strategy = Beam(width=2, max_fragments=4, fractions=(1.0, 0.6))
    found = list(strategy(space))
    depths = [len(c.steps) for c in found]
    assert depths == sorted(depths)
    assert set(depths) == {2, 3, 4}
    cheapest = min(source.parts.cost.macs for source in space.sources)
    sizes = set()
    for depth in (2, 3, 4):
        level = [c for c in found if len(c.steps) == depth]
        assert [c.cka_product for c in level] == sorted((c.cka_product for c in level), reverse=True)
        for lower, upper in ((0, 0.6), (0.6, 1.0), (1.0, np.inf)):
            ends = [c.steps[-2:] for c in level if lower * cheapest < c.cost.macs <= upper * cheapest]
            sizes |= {upper} if ends else set()
            assert len(ends) <= 2
            assert len({(a.source, b.source, b.first) for a, b in ends}) == len(ends)
            assert len({(a.source, a.last, b.source) for a, b in ends}) == len(ends)
    assert len(sizes) == 3


def test_beam_keeps_the_best_stitch_of_every_size_class() -> None:
    space = space_of(pair(), IMAGES, settings=replace(PAPER, granularity="all"))
    edges = [edge for state in space.starts() for cut, x in space.walk(state) for edge in space.edges(state, cut, x)]
    cheapest = space.cheapest_source.macs
    best = {}
    for edge in edges:
        size = sum(edge.total.macs <= share * cheapest for share in (1.0, 0.7, 0.4))
        best[size] = max(best.get(size, -1), edge.product)
    found = [c.cka_product for c in Beam(width=1, max_fragments=2, fractions=(1.0, 0.7, 0.4))(space)]
    assert found == sorted(best.values(), reverse=True)
    assert len(found) > 2


def test_beam_follows_what_a_later_stitch_brings_within_the_budget() -> None:
    sources = pair()
    free = space_of(sources, IMAGES, max_fragments=3)
    limit = int(2.2 * free.cheapest_source.macs)
    with_one_stitch = {
        (edge.state.source, edge.cut, edge.source, edge.receiver): edge.total.macs
        for state in free.starts()
        for cut, x in free.walk(state)
        for edge in free.edges(state, cut, x)
    }
    space = space_of(sources, IMAGES, budget=Budget(max_macs=limit), max_fragments=3)
    found = list(Beam(width=9, max_fragments=3, max_upsampling=math.inf)(space))
    assert max(c.cost.macs for c in found) <= limit
    longer = [c.steps for c in found if len(c.steps) == 3]
    parents = [with_one_stitch[a.source, a.last - 1, b.source, b.first - 1] for a, b, _ in longer]
    assert max(parents) > limit


def test_beam_counts_what_its_last_level_finds_over_the_budget() -> None:
    sources = pair()
    limit = int(2.2 * space_of(sources, IMAGES).cheapest_source.macs)
    scored, searched = (space_of(sources, IMAGES, budget=Budget(max_macs=limit), max_fragments=3) for _ in range(2))
    edges = [edge for state in scored.starts() for cut, x in scored.walk(state) for edge in scored.edges(state, cut, x)]
    over = sum(edge.total.macs > limit for edge in edges)
    assert over > 0
    assert len(list(Beam(width=9, max_fragments=2, max_upsampling=math.inf)(searched))) > 0
    assert searched.rejected["over the budget"] == scored.rejected["over the budget"] + over


def test_beam_obeys_its_threshold() -> None:
    found = list(Beam(threshold=0.6)(paper_space()))
    assert found
    assert min(c.cka_product for c in found) >= 0.6
    assert min(c.cka_product for c in Beam()(paper_space())) < 0.6


@pytest.mark.parametrize("strategy", [Beam(), DepthFirst(threshold=0, edge_threshold=0, sample=True, seed=1)])
def test_a_search_repeats_whatever_the_global_random_state_and_leaves_it_alone(
    strategy: Callable[[SearchSpace], Iterator[Candidate]],
) -> None:
    sources, settings = pair(), CalibrationSettings(rows_per_image=8)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        found.append(recipes(list(strategy(space_of(sources, IMAGES, settings=settings)))))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.array_equal(np.random.get_state()[1], before[2])
    assert found[0]
    assert found[0] == found[1]


def test_another_seed_samples_other_rows() -> None:
    def ckas(seed: int) -> list[float]:
        space = space_of(pair(), IMAGES, settings=CalibrationSettings(rows_per_image=8, seed=seed))
        return [edge.cka for edge in space.edges(space.starts()[0], 0, space.sources[0].activations[0])]

    assert ckas(0) == ckas(0)
    assert ckas(0) != ckas(1)
    assert ckas(0) == pytest.approx(ckas(1), abs=0.3)


@pytest.fixture(scope="module")
def timm_space() -> SearchSpace:
    sources = [donor("test_resnet", 0), donor("test_efficientnet", 1)]
    return space_of(sources, digits(8, 64)[0])


STRATEGIES = [
    Beam(width=2),
    DepthFirst(span=2, threshold=-1, edge_threshold=-1, max_fragments=5, max_networks=12),
    Beam(width=1, max_fragments=4, fractions=(0.3,)),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_candidates_cost_and_compute_what_the_assembled_network_does(
    timm_space: SearchSpace, strategy: Callable[[SearchSpace], Iterator[Candidate]]
) -> None:
    found = [*references(timm_space), *strategy(timm_space)]
    images = digits(6, 64, first=50)[0]
    outcomes = run_all(found, [source.parts for source in timm_space.sources], [images])
    for candidate, outcome in zip(found, outcomes, strict=True):
        network = network_of(timm_space, candidate)
        cost = network_cost(network, (3, 64, 64))
        assert (candidate.recipe.scores["params"], candidate.recipe.scores["macs"]) == (cost.params, cost.macs)
        assert (candidate.cost.params, candidate.cost.macs) == (cost.params, cost.macs)
        with torch.no_grad():
            features = network(images)
        assert float((features - outcome.features).norm() / outcome.features.norm()) < 1e-4
    placements = {stitch.placement for c in found for stitch in c.recipe.stitches if stitch}
    assert "explicit" in placements


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
@pytest.mark.parametrize("limit", ["max_macs", "max_params"])
def test_every_candidate_keeps_the_budget(
    timm_space: SearchSpace, strategy: Callable[[SearchSpace], Iterator[Candidate]], limit: str
) -> None:
    measure = limit.removeprefix("max_")
    free = sorted(getattr(c.cost, measure) for c in strategy(timm_space))
    most = free[len(free) // 3]
    space = SearchSpace(timm_space.sources, timm_space.settings, costs=timm_space.costs, budget=Budget(**{limit: most}))
    found = list(strategy(space))
    assert found
    assert max(getattr(c.cost, measure) for c in found) <= most < free[-1]


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_no_image_goes_in_again_during_the_search(
    timm_space: SearchSpace, strategy: Callable[[SearchSpace], Iterator[Candidate]]
) -> None:
    one, other = (source.parts.source for source in timm_space.sources)
    with images_seen(one) as first, images_seen(other) as second:
        assert list(strategy(timm_space))
        assert references(timm_space)
        assert first == second == []
        one.module(IMAGES)
        assert first == [len(IMAGES)]


@pytest.mark.parametrize(("factor", "finest"), [(1.0, 1.0), (2.0, 1.0), (4.0, 4.0), (64.0, 16.0)])
def test_beam_leaves_receivers_of_too_fine_a_grid_out_and_counts_them(factor: float, finest: float) -> None:
    space = space_of(pair(), IMAGES, settings=replace(PAPER, granularity="all"))
    grids = [
        (spec.in_size, spec.out_size)
        for candidate in Beam(width=99, max_fragments=2, max_upsampling=factor)(space)
        for spec in candidate.recipe.stitches
        if spec is not None
    ]
    assert max(math.prod(new) / math.prod(old) for old, new in grids if old and new) == finest
    assert (space.rejected["receiver's grid too fine for the sender's"] > 0) == (factor < 64)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (lambda: DepthFirst(span=0), "span must be at least 1; found 0"),
        (lambda: DepthFirst(max_networks=0), "max_networks must be at least 1; found 0"),
        (lambda: DepthFirst(max_fragments=1), "max_fragments must be at least 2, .*found 1"),
        (lambda: Beam(width=0), "width must be at least 1; found 0"),
        (lambda: Beam(max_upsampling=0.5), "max_upsampling must be at least 1; found 0.5"),
        (lambda: Beam(max_fragments=1), "max_fragments must be at least 2, .*found 1"),
    ],
)
def test_strategies_refuse_what_cannot_find_anything(strategy: Callable[[], object], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        strategy()
