from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from doubles.outcomes import run_all
from doubles.pools import path, references, space_of
from doubles.small_sources import donor, live, plain, shake
from doubles.tensors import digits, noise
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import Tensor, nn

from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io.activation_store import Carried
from lightning_stitch.maths.cka import linear_cka
from lightning_stitch.search import scoring
from lightning_stitch.search.space import Edge, Filters, SearchSpace, State
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

IMAGES = 0.7 * digits(12, 8)[0] + 0.3 * noise(12, 3, 8, 8)
ALL_ROWS = CalibrationSettings(rows_per_image=256, until="output")


def pair() -> list[Source]:
    return [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]


def activation(space: SearchSpace, state: State, cut: int) -> Carried:
    return dict(space.walk(state))[cut]


def rows_on(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """All positions of a map on a grid, or its mean, computed anew."""
    if grid is None:
        return x.mean((2, 3)) if x.ndim == 4 else x
    if x.shape[2:] != grid:
        x = nn.functional.interpolate(x, size=grid, mode="bilinear", align_corners=False, antialias=True)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def run(space: SearchSpace, candidates: list[Candidate], images: Tensor) -> list[Tensor]:
    return [outcome.features for outcome in run_all(candidates, [source.parts for source in space.sources], [images])]


def entered(space: SearchSpace, source: int, cut: int, receiver: tuple[int, int]) -> tuple[Edge, Carried, State]:
    state = space.starts()[source]
    x = activation(space, state, cut)
    edge = next(
        e for e in space.edges(state, cut, x, Filters(min_cka=-9, min_product=-9)) if (e.source, e.receiver) == receiver
    )
    return edge, x, space.enter(edge, x)


def receivers(edges: list[Edge]) -> list[tuple[int, int]]:
    return sorted((edge.source, edge.receiver) for edge in edges)


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_edges_are_scored_on_the_receivers_grid(estimator: str) -> None:
    settings = CalibrationSettings(rows_per_image=256, until="output", estimator=estimator)  # type: ignore[arg-type]
    space = space_of(pair(), IMAGES, settings=settings)
    _, _, second = entered(space, 0, 0, (1, 0))
    scored = 0
    for state in (*space.starts(), second):
        for cut, x in space.walk(state):
            for edge in space.edges(state, cut, x, Filters(min_cka=-9, min_product=-9)):
                y = space.sources[edge.source].activations[edge.receiver].whole()
                grid = tuple(y.shape[2:]) if y.ndim == 4 else None
                expected = linear_cka(rows_on(x.whole(), grid), rows_on(y, grid), estimator=estimator)  # type: ignore[arg-type]
                assert edge.cka == pytest.approx(float(expected), abs=1e-6)
                assert edge.product == pytest.approx(state.product * edge.cka)
                scored += 1
    assert scored > 12


def test_scores_use_the_sampled_rows_of_both_sides() -> None:
    settings = CalibrationSettings(rows_per_image=5)
    space = space_of(pair(), IMAGES, settings=settings)
    state = space.starts()[0]
    edges = {
        (e.source, e.receiver): e.cka for e in space.edges(state, 1, activation(space, state, 1), Filters(min_cka=-9))
    }
    receiver = space.sources[1].statistics[0]
    assert receiver.cut.grid == space.sources[0].parts.cuts[1].grid
    expected = linear_cka(space.sources[0].statistics[1].rows, receiver.rows)
    assert edges[1, 0] == pytest.approx(float(expected), abs=1e-6)


def test_every_bridgeable_receiver_is_an_edge_or_counted() -> None:
    space = space_of(pair(), IMAGES, settings=ALL_ROWS)
    state = space.starts()[0]
    # From the vector "2": the vectors "2" of both sources, of which its own is no stitch but the way on.
    edges = space.edges(state, 2, activation(space, state, 2), Filters(min_cka=-9, min_product=-9))
    assert receivers(edges) == [(1, 2)]
    assert not space.rejected
    edges = space.edges(state, 1, activation(space, state, 1), Filters(min_cka=-9, min_product=-9))
    assert receivers(edges) == [(0, 2), (1, 0), (1, 1), (1, 2)]
    assert space.rejected == {"fragment used already": 1}
    edges = space.edges(state, 1, activation(space, state, 1), Filters(single_pieces=True, min_cka=-9, min_product=-9))
    assert receivers(edges) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert space.rejected == {"fragment used already": 2}


def test_what_is_turned_down_is_counted_by_reason() -> None:
    space = space_of(pair(), IMAGES, settings=ALL_ROWS)
    state = space.starts()[0]
    x = activation(space, state, 0)
    free = space.edges(state, 0, x, Filters(min_cka=-9, min_product=-9))
    assert len(free) == 5
    ckas = sorted(edge.cka for edge in free)

    space.rejected.clear()
    assert len(space.edges(state, 0, x, Filters(min_cka=ckas[2], min_product=-9))) == 3
    assert space.rejected == {"CKA below the edge threshold": 2}

    space.rejected.clear()
    assert len(space.edges(state, 0, x, Filters(min_cka=-9, min_product=ckas[3]))) == 2
    assert space.rejected == {"product of CKAs below the threshold": 3}

    space.rejected.clear()
    edges = space.edges(state, 0, x, Filters(only_ends=True, min_cka=-9, min_product=-9))
    assert receivers(edges) == [(0, 2), (1, 2)]
    assert space.rejected == {"not an end fragment at the last depth": 4}

    cost = sorted(edge.total.macs for edge in free)
    tight = space_of(pair(), IMAGES, settings=ALL_ROWS, budget=Budget(max_macs=cost[1]), max_fragments=2)
    assert len(tight.edges(state, 0, x, Filters(min_cka=-9, min_product=-9))) == 2
    assert tight.rejected == {"over the budget": 3}


def one_pixel(x: Tensor) -> Tensor:
    x = torch.zeros_like(x)
    x[0, :, 0, 0] = 1
    return x


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda x: x.index_fill(0, torch.tensor(3), math.inf), "activation not finite"),
        (lambda x: x * math.nan, "activation not finite"),
        (lambda x: torch.ones_like(x), "activation of the sender does not vary"),
        (one_pixel, "activation of the sender does not vary"),
    ],
)
def test_an_activation_that_carries_nothing_leads_nowhere(broken: object, reason: str) -> None:
    space = space_of(pair(), IMAGES)
    state = space.starts()[0]
    x = activation(space, state, 0)
    expected = len(space.edges(state, 0, x, Filters(min_cka=-9, min_product=-9)))
    assert space.edges(state, 0, Carried([lambda: broken(x.whole())]), Filters(min_cka=-9, min_product=-9)) == []  # type: ignore[operator]
    assert space.rejected == {reason: expected}


class Corner(nn.Module):
    """Lets nothing through but the corner of an 8x8 map."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", 64 * nn.functional.pad(torch.ones(1, 1), (0, 7, 0, 7)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def cornered(seed: int = 0) -> Source:
    """A source whose cut "2" is zero wherever it is sampled, though the network goes on from its corner."""
    block = [nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), nn.Conv2d(5, 6, 1, bias=False), Corner()]
    rest = [nn.Sequential(nn.Conv2d(6, 7, 8, padding=4), nn.ReLU()), nn.Conv2d(7, 8, 1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return live(shake(nn.Sequential(*block, *rest, *head), seed), "cornered", size=8)


CORNERED = CalibrationSettings(granularity={"cornered": ["0", "2", "3"], "a": "blocks"}, rows_per_image=6, seed=3)


def test_a_receiver_that_does_not_vary_is_no_candidate() -> None:
    space = space_of([cornered(), plain("a", (5, 6, 8), seed=0)], IMAGES, settings=CORNERED)
    assert [kept.centred is None for kept in space.sources[0].statistics] == [False, True, False]
    state = space.starts()[1]
    edges = space.edges(state, 0, activation(space, state, 0), Filters(min_cka=-9, min_product=-9))
    assert receivers(edges) == [(0, 0), (0, 2), (1, 1)]
    assert space.rejected == {"activation of the receiver does not vary": 1}


def test_a_source_is_stitched_to_itself_past_a_cut_that_does_not_vary() -> None:
    space = space_of([cornered()], IMAGES, settings=CORNERED, ridge=0.0)
    source, stitched = references(space)
    assert path(stitched) == [("cornered", None, "0"), ("cornered", "0", "3"), ("cornered", "3", "7")]
    expected, features = run(space, [source, stitched], noise(5, 3, 8, 8, seed=9))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_a_source_with_nothing_that_varies_is_still_a_reference() -> None:
    dead = plain("dead", (5, 6, 8), seed=0)
    for parameter in dead.module[0].parameters():
        parameter.data.zero_()
    space = space_of([dead], noise(8, 3, 8, 8))
    assert [c.kind for c in references(space)] == ["source", "self-stitched"]
    assert path(references(space)[1]) == [("dead", None, "2")]
    assert space.rejected["activation of the receiver does not vary"] > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("receiver", [(1, 0), (1, 1), (0, 2)])
def test_a_stitch_is_the_ridge_regression_of_the_sampled_rows(
    receiver: tuple[int, int], ridge: float, bias: bool
) -> None:
    space = space_of(pair(), IMAGES, settings=ALL_ROWS, ridge=ridge, bias=bias)
    _, x, state = entered(space, 0, 0, receiver)
    y = space.sources[receiver[0]].activations[receiver[1]].whole()
    grid = tuple(y.shape[2:]) if y.ndim == 4 else None
    inputs, outputs = rows_on(x.whole(), grid).double().numpy(), rows_on(y, grid).double().numpy()
    assert state.stitch is not None
    assert state.stitch.weight is not None
    assert state.spec is not None
    assert state.activation is x

    def fit(inputs: np.ndarray, outputs: np.ndarray) -> Ridge:
        centred = inputs - inputs.mean(0) if bias else inputs
        # A tiny alpha stands for none: scikit-learn's solver wants a regular matrix.
        alpha = max(ridge, 1e-12) * float((centred**2).sum()) / inputs.shape[1]
        return Ridge(alpha=alpha, fit_intercept=bias).fit(inputs, outputs)

    whole = fit(inputs, outputs)
    np.testing.assert_allclose(state.stitch.weight.detach().numpy(), whole.coef_, atol=1e-4)
    assert (state.stitch.bias is not None) == bias
    with torch.no_grad():
        carried = rows_on(state.stitch(x.whole()), grid).numpy()
    np.testing.assert_allclose(carried, whole.predict(inputs), atol=1e-4)
    split = len(inputs) * 9 // 12
    held_out = fit(inputs[:split], outputs[:split]).predict(inputs[split:])
    expected = r2_score(outputs[split:], held_out, multioutput="variance_weighted")
    assert state.spec.r2 == pytest.approx(expected, abs=1e-4)
    assert state.spec.rank == np.linalg.matrix_rank(inputs - inputs.mean(0) if bias else inputs, tol=1e-5)
    assert state.spec.condition is not None
    assert state.spec.condition >= 1


def test_a_path_is_carried_forward_by_its_own_fragments() -> None:
    space = space_of(pair(), IMAGES, settings=ALL_ROWS)
    edge, x, state = entered(space, 0, 0, (1, 0))
    assert state.stitch is not None
    graph = space.sources[1].parts.graph
    for cut, onward in space.walk(state):
        with torch.no_grad():
            expected = graph.fragment("0", ["0", "1", "2"][cut])(state.stitch(x.whole()))
        torch.testing.assert_close(onward.whole(), expected)
        assert cut >= 1
    assert state.used == {(0, 0)}
    assert (state.source, state.entry, state.product) == (1, 1, edge.product)
    assert state.cost == edge.cost
    assert space.complete(state).cost == edge.total
    assert path(space.complete(state)) == [("a", None, "0"), ("b", "0", None)]


def test_references_are_every_source_and_every_source_stitched_to_itself() -> None:
    space = space_of(pair(), IMAGES, settings=ALL_ROWS)
    found = references(space)
    assert [c.kind for c in found] == ["source", "source", "self-stitched", "self-stitched"]
    assert [path(c) for c in found[:2]] == [[("a", None, None)], [("b", None, None)]]
    chain = [(None, "0"), ("0", "1"), ("1", "2"), ("2", None)]
    assert [path(c) for c in found[2:]] == [[(name, *ends) for ends in chain] for name in "ab"]
    assert [c.cost for c in found[:2]] == [source.parts.cost for source in space.sources]
    assert [c.cost for c in found[2:]] == [space.costs.self_stitched(0), space.costs.self_stitched(1)]
    assert [c.cka_product for c in found] == pytest.approx([1, 1, 1, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("count", "ridge", "low", "high"), [(24, 0.0, 0, 1e-4), (24, 1e-3, 1e-4, 0.1), (5, 0.0, 1e-3, 9)]
)
def test_a_self_stitched_source_gives_its_features_where_rows_suffice(
    count: int, ridge: float, low: float, high: float
) -> None:
    # The vector "2" has one row for each image: with 5 of them its 8 channels are not determined.
    images = noise(count, 3, 8, 8)
    space = space_of(pair()[:1], images, settings=ALL_ROWS, ridge=ridge)
    own, stitched = run(space, references(space), noise(16, 3, 8, 8, seed=5))
    assert low <= float((stitched - own).norm() / own.norm()) <= high


def test_sources_of_a_fixed_size_keep_their_view_and_the_recipe_the_images_size() -> None:
    fixed = live(plain("fixed", (5, 6, 8), seed=0).module, "fixed", size=16, fixed_size=True)
    space = space_of([fixed, plain("b", (4, 7, 9), seed=1)], IMAGES)
    _, x, state = entered(space, 0, 0, (1, 0))
    assert x.whole().shape[2:] == (16, 16)
    assert space.sources[1].activations[0].whole().shape[2:] == (8, 8)
    recipe = space.complete(state).recipe
    assert recipe.input_size == (3, 8, 8)
    assert recipe.stitches[0] is not None
    assert (recipe.stitches[0].in_size, recipe.stitches[0].out_size) == ((16, 16), (8, 8))


def test_prefix_tokens_of_the_receiver_come_from_its_calibration_mean() -> None:
    images = noise(6, 3, 160, 160)
    space = space_of([donor("test_resnet"), donor("test_vit")], images, settings=CalibrationSettings(granularity="all"))
    receiver = next(i for i, kept in enumerate(space.sources[1].statistics) if kept.prefix is not None)
    _, x, state = entered(space, 0, len(space.sources[0].parts.cuts) - 1, (1, receiver))
    prefix = space.sources[1].activations[receiver].whole()[:, :1].mean(0)
    assert state.stitch is not None
    with torch.no_grad():
        torch.testing.assert_close(state.stitch(x.whole())[:, :1], prefix.expand(6, 1, -1))
    assert torch.isfinite(run(space, [space.complete(state)], images[:2])[0]).all()


def test_a_cka_that_overflows_names_cut_and_source() -> None:
    huge = plain("huge", (24, 24, 24), seed=0)
    with torch.no_grad():
        huge.module[0][0].weight *= 1e27  # type: ignore[index, operator]
        huge.module[0][0].bias *= 1e27  # type: ignore[index, operator]
    space = space_of([plain("a", (24, 24, 24), seed=1), huge], IMAGES)
    state = space.starts()[1]
    words = r"CKA overflows: .* Those of cut '\d' of source 'huge' go up to \d.*e\+2\d from their mean"
    x = activation(space, state, 0)
    with pytest.raises(CalibrationError, match=words):
        space.edges(state, 0, x)


def test_of_many_receivers_those_most_alike_in_a_sketch_are_scored_as_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = [plain(f"s{number}", (6, 8, 10), seed=number) for number in range(5)]
    images = noise(24, 3, 24, 24, seed=9)

    def found() -> tuple[dict[tuple[int, int], float], SearchSpace]:
        space = space_of(sources, images)
        state = space.starts()[0]
        cut, x = next(iter(space.walk(state)))
        return {(edge.source, edge.receiver): edge.cka for edge in space.edges(state, cut, x)}, space

    whole, before = found()
    monkeypatch.setattr(scoring, "MANY", 8)
    monkeypatch.setattr(scoring, "_KEPT", 5)
    assert len(whole) > 8
    likely, space = found()
    assert len(likely) == 5
    assert likely == pytest.approx({receiver: whole[receiver] for receiver in likely}, abs=1e-6)
    reason = "not among the most alike in a sketch"
    assert space.rejected[reason] == len(whole) - 5
    assert space.rejected - before.rejected == {reason: len(whole) - 5}
    # An eighth of some 700 rows tells these apart.
    assert max(whole, key=whole.__getitem__) in likely
    assert found()[0] == likely


def test_what_a_sketch_says_nothing_of_is_scored_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MANY", 1)
    monkeypatch.setattr(scoring, "_KEPT", 0)
    space = space_of(
        pair(), noise(8, 3, 24, 24, seed=2), settings=CalibrationSettings(rows_per_image=1, readout="last")
    )
    state = space.starts()[0]
    cut, x = next(iter(space.walk(state)))
    monkeypatch.setattr(scoring, "_STRIDE", 4)  # two rows: too few for a debiased estimate
    assert space.edges(state, cut, x)
    assert not space.rejected["not among the most alike in a sketch"]
