from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles.outcomes import selection_of
from doubles.pools import path
from doubles.progress import Recorder
from doubles.references import sums_of
from doubles.small_sources import images_seen, live, plain, shake
from doubles.tensors import digits, noise
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import BudgetError, CalibrationError, CutError, StitchError
from lightning_stitch.progress import Silent
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.ranking import RANKINGS, SelectionData, find_ranking
from lightning_stitch.search.results import SearchResult, pick
from lightning_stitch.search.strategies import Beam, DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
IMAGES, LABELS = digits(40, 16, first=20, classes=3)
SELECTION = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)


def sources() -> list[Source]:
    return [plain("a", (8, 9, 10), seed=0), plain("b", (4, 7, 12), seed=1, strides=(2, 2, 1))]


def pool_of(*found: Source, **settings: object) -> Pool:
    settings = {"readout": "last", **settings}
    return Pool(found or sources(), SHAPE, settings=CalibrationSettings(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return pool_of()


@pytest.fixture(scope="module")
def result(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], SELECTION, max_roots=1)


def never() -> Iterator[Tensor]:
    """Images that nobody may ask for."""
    raise AssertionError("an image was read")
    yield


def records(result: SearchResult) -> list[tuple[object, ...]]:
    return [(r.candidate.kind, r.candidate.recipe.to_dict(), r.scores) for r in result.ranked]


def test_the_result_is_in_the_order_of_its_scores(pool: Pool, result: SearchResult) -> None:
    kinds = [r.candidate.kind for r in result.ranked]
    assert (kinds.count("source"), kinds.count("self-stitched")) == (2, 2)
    assert kinds.count("stitched") + kinds.count("shortened") > 4
    scores = [tuple(r.scores.values()) for r in result.ranked]
    assert scores == sorted(scores, reverse=True)
    for kind, best in (
        ("source", result.best_source),
        ("self-stitched", result.within(Budget(), kind="self-stitched")),
        ("stitched", result.best_stitched),
    ):
        assert best is result.ranked[kinds.index(kind)]
    assert result.best is pick(result.ranked, Budget())
    assert result.num_selection_labels == 40
    assert set(result.seconds) == {"cut", "calibrate", "search", "rank"}


@pytest.mark.parametrize("ranking", ["auto", *RANKINGS])
def test_scores_are_those_of_the_assembled_networks(pool: Pool, ranking: str) -> None:
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=ranking, max_candidates=4)
    candidates = [ranked.candidate for ranked in result.ranked]
    networks = [pool.assemble(candidate) for candidate in candidates]
    with torch.no_grad():
        features = [network(IMAGES) for network in networks]
    last = [candidate.recipe.fragments[-1].source for candidate in candidates]
    own = {name: x for name, x, c in zip(last, features, candidates, strict=True) if c.kind == "source"}
    selection = selection_of(features, LABELS, [own[name] for name in last], 3)
    expected = find_ranking(ranking, labelled=True)(candidates, selection)
    for ranked, network, x, scores in zip(result.ranked, networks, features, expected, strict=True):
        assert ranked.scores == pytest.approx(scores, abs=1e-3)
        assert ranked.features == x.shape[1]
        assert network.recipe.scores.items() >= ranked.scores.items()
        assert sums_of(network, SHAPE) == ranked.candidate.cost
    decisive = "loo_soft_r2" if ranking == "auto" else ranking
    assert next(iter(result.best.scores)) == decisive
    assert decisive in networks[candidates.index(result.best.candidate)].describe()


def test_without_labels_the_consensus_of_the_sources_decides(pool: Pool) -> None:
    result = pool.search([CALIBRATION], [IMAGES], max_candidates=2)
    assert list(result.best.scores) == ["consensus", "agreement"]
    assert result.best is result.best_source
    assert result.num_selection_labels == 0
    with pytest.raises(CalibrationError, match="needs labels for the selection images"):
        pool.search(unread(), [IMAGES], ranking="loo_r2", max_candidates=2)


def unread() -> Iterator[Tensor]:
    raise AssertionError("a calibration image was read")
    yield


def test_images_of_another_precision_are_taken_as_float32(pool: Pool) -> None:
    expected = pool.search([CALIBRATION], [IMAGES], max_candidates=2)
    found = pool.search([CALIBRATION.double()], [IMAGES.double()], max_candidates=2)
    assert [r.candidate.recipe for r in found.ranked] == [r.candidate.recipe for r in expected.ranked]


def test_a_users_ranking_sees_features_labels_and_the_sources_own_features(pool: Pool) -> None:
    seen = []

    def smallest(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
        seen.append(selection)
        assert len(candidates) == len(selection.features) == len(selection.own_features)
        for candidate, own in zip(candidates, selection.own_features, strict=True):
            last = "ab".index(candidate.recipe.fragments[-1].source)
            assert own is selection.features[last]
        return [{"neg_macs": -candidate.cost.macs} for candidate in candidates]

    result = pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=smallest)
    assert [r.candidate.cost.macs for r in result.ranked] == sorted(r.candidate.cost.macs for r in result.ranked)
    assert seen[0].num_classes == 3
    assert torch.equal(seen[0].targets, LABELS)
    assert result.best.scores == {"neg_macs": float(-result.best.candidate.cost.macs)}
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=smallest, num_classes=5)
    assert seen[1].num_classes == 5


def test_ties_go_to_the_sources(pool: Pool) -> None:
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=lambda cs, _: [{"same": 1.0}] * len(cs))
    assert result.best is result.best_source is result.ranked[0]
    assert [r.candidate.kind for r in result.ranked[:4]] == ["source", "source", "self-stitched", "self-stitched"]
    assert not result.beat_best_source
    assert result.summary() == (
        "No candidate beat the best source by more than a standard error on the selection images: a has same 1.0000; "
        "it is returned as it is."
    )


def prefer(*order: str) -> object:
    """A ranking by kind and last source."""

    def score(candidates: Sequence[Candidate], _: SelectionData) -> list[dict[str, float]]:
        names = [f"{c.kind} {c.recipe.fragments[-1].source}" for c in candidates]
        return [{"wish": -float(order.index(name)) if name in order else -9.0} for name in names]

    return score


def test_the_result_says_plainly_whether_a_candidate_beat_the_best_source(pool: Pool) -> None:
    macs = {source.name: source.cost.macs for source in pool.parts}
    assert macs["b"] < macs["a"]
    won = pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=prefer("stitched b", "source a"))  # type: ignore[arg-type]
    assert won.beat_best_source
    assert won.summary().startswith("The best candidate (stitched, ")
    assert "has wish -0.0000 on the selection images, the best source (a, " in won.summary()

    budget = Budget(max_macs=macs["b"])
    over = pool.search(
        [CALIBRATION],
        SELECTION,
        ranking=prefer("source a", "source b"),  # type: ignore[arg-type]
        budget=budget,
    )
    assert path(over.best.candidate) == [("b", None, "2")]
    assert path(over.best_source.candidate) == [("a", None, "2")]
    assert not over.beat_best_source
    assert over.summary().startswith("No candidate within the budget beat the best source on the selection images: a (")
    assert "but is over the budget; the best within it (source, " in over.summary()

    behind = pool.search(
        [CALIBRATION],
        SELECTION,
        ranking=prefer("source a", "shortened b"),  # type: ignore[arg-type]
        budget=budget,
    )
    assert behind.best.candidate.kind == "shortened"
    assert not behind.beat_best_source
    assert "but is over the budget; the best within it (shortened, " in behind.summary()


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize(("exits", "kind"), [(True, "early exit"), (False, "shortened")])
def test_a_budget_of_exactly_the_cheapest_compositions_cost_is_met_and_one_less_is_refused(
    measure: str, exits: bool, kind: str
) -> None:
    pool = pool_of()
    strategy = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=3)
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=3, early_exits=exits)
    least, words = costs.cheapest(measure)
    enough, less = (Budget(**{f"max_{measure}": limit}) for limit in (least, least - 1))
    met = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=strategy, budget=enough, exits=exits)
    assert met.best.candidate.kind == kind
    assert getattr(met.best.candidate.cost, measure) == least
    assert met.rejected["over the budget"] > 0
    with (
        images_seen(pool.parts[0].source) as first,
        images_seen(pool.parts[1].source) as second,
        pytest.raises(BudgetError, match=rf"the cheapest composition has {least / 1e6:.12g} M \({words}\)"),
    ):
        pool.search(never(), never(), strategy=strategy, budget=less, exits=exits)
    assert first == second == []


def test_a_budget_that_the_search_does_not_reach_names_the_cheapest_found(pool: Pool) -> None:
    least = CompositionCosts(pool.parts, bias=True, max_fragments=2).cheapest("macs")[0]
    strategy = Beam(threshold=0.9999, max_fragments=2)
    with pytest.raises(
        BudgetError, match=r"within the budget \(at most .* M MACs\); the cheapest it found has 0\.00 M"
    ):
        pool.search(
            [CALIBRATION], SELECTION, max_roots=1, strategy=strategy, budget=Budget(max_macs=least), exits=False
        )


@pytest.mark.parametrize("strategy", [Beam(), DepthFirst(threshold=0, edge_threshold=0)])
def test_the_same_input_gives_the_same_result_whatever_the_global_random_state(strategy: Beam | DepthFirst) -> None:
    found = []
    given = sources()
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        # A list, because iterating over a loader draws from the global state, as it always does.
        result = pool_of(*given, rows_per_image=9).search([CALIBRATION], [(IMAGES, LABELS)], strategy=strategy)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.array_equal(np.random.get_state()[1], before[2])
        found.append(records(result))
    assert found[0] == found[1]
    other = pool_of(*given, rows_per_image=9, seed=1).search([CALIBRATION], [(IMAGES, LABELS)], strategy=strategy)
    assert records(other) != found[0]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_no_score(pool: Pool, result: SearchResult, batch_size: int) -> None:
    again = pool.search(
        CALIBRATION.split(batch_size),
        zip(IMAGES.split(batch_size), LABELS.split(batch_size), strict=True),
        max_roots=1,
    )
    assert [path(r.candidate) for r in again.ranked] == [path(r.candidate) for r in result.ranked]
    for one, other in zip(again.ranked, result.ranked, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert one.candidate.recipe.scores == pytest.approx(other.candidate.recipe.scores, abs=1e-5)
        ckas = [[s.cka for s in r.candidate.recipe.stitches if s] for r in (one, other)]
        assert ckas[0] == pytest.approx(ckas[1], abs=1e-5)


def test_every_image_goes_once_through_each_source(pool: Pool) -> None:
    with images_seen(pool.parts[0].source) as first, images_seen(pool.parts[1].source) as second:
        result = pool.search(CALIBRATION.split(5), SELECTION)
    assert sum(first) == sum(second) == len(CALIBRATION) + len(IMAGES)
    assert len(result.ranked) > 8
    assert all(source.activations == [] for source in pool.calibration.sources)


def test_depth_first_does_not_pass_a_self_stitched_source_off_as_a_stitchnet(pool: Pool) -> None:
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=DepthFirst(threshold=0, edge_threshold=0))
    paths = [str(path(r.candidate)) for r in result.ranked]
    assert len(set(paths)) == len(paths)
    assert result.rejected["a source stitched to itself, which is a candidate already"] > 0


def test_no_more_candidates_than_asked_for_are_ranked(pool: Pool) -> None:
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, max_candidates=3)
    assert sum(r.candidate.kind in ("stitched", "shortened") for r in result.ranked) == 3
    assert pool.search([CALIBRATION], SELECTION, max_roots=1, max_candidates=0).best_stitched is None


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_a_network_whose_features_are_useless_is_counted_and_not_ranked() -> None:
    # Behind a stitch its input may be negative, and then the root is NaN.
    widths = (6, 5)
    layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU(), nn.Conv2d(widths[0], widths[1], 1), nn.ReLU()]
    rooted = nn.Sequential(*layers, Root(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[1], 3))
    fragile = live(shake(nn.Sequential(*layers, Root(), nn.Conv2d(5, 5, 1), *rooted[5:]), 0), "fragile")
    given = [sources()[0], fragile]
    pool = pool_of(*given, granularity={"fragile": ["3"], "a": "blocks"})
    result = pool.search([CALIBRATION], SELECTION, max_roots=1)
    assert result.rejected["features not finite or constant on the selection images"] > 0
    assert {r.candidate.kind for r in result.ranked} >= {"source", "stitched"}
    assert all(math.isfinite(value) for r in result.ranked for value in r.scores.values())
    assert not any(path(r.candidate)[1:] == [("fragile", "3", "6")] for r in result.ranked)


def test_networks_may_end_in_a_shared_output() -> None:
    pool = pool_of(until="output")
    result = pool.search([CALIBRATION], [IMAGES])
    assert {r.features for r in result.ranked} == {4}
    assert {r.candidate.recipe.fragments[-1].end for r in result.ranked} == {None}
    fitted = [s for r in result.ranked for s in r.candidate.recipe.stitches if s]
    assert {(s.in_format, s.out_format) for s in fitted} >= {("NCHW", "NCHW"), ("NCHW", "vector"), ("vector", "vector")}
    assert not any((s.in_format, s.out_format) == ("vector", "NCHW") for s in fitted)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Pool([], SHAPE), StitchError, "at least one source"),
        (lambda: pool_of(*sources()[:1] * 2), StitchError, r"names of their own; found \['a', 'a'\]"),
        (
            lambda: Pool(sources(), (1, 16, 16)),
            CutError,
            "'a' takes images of 3 channels; the calibration images have 1",
        ),
        (lambda: pool_of(granularity={"c": "all"}), StitchError, r"names \['c'\], but the sources are \['a', 'b'\]"),
        (
            lambda: pool_of(*sources(), plain("c", (4, 5, 6), seed=2, classes=7), until="output"),
            StitchError,
            r"sources with the same outputs; found widths {'a': 4, 'b': 4, 'c': 7}.*Leave the odd ones out",
        ),
    ],
)
def test_a_pool_that_cannot_work_is_refused(build: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()  # type: ignore[operator]


BROKEN = CALIBRATION.clone()
BROKEN[3, 1, 4, 4] = math.nan


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([BROKEN[:2], BROKEN[2:]], "1 of the 10 images have NaN or infinite values"),
        ([CALIBRATION * math.inf], "NaN or infinite"),
        ([(CALIBRATION * 255).to(torch.uint8)], r"found torch.uint8 .* divide them, images.float\(\) / 255"),
        ([CALIBRATION * 255], r"found torch.float32 .* divide them, images.float\(\) / 255"),
        ([(CALIBRATION - 0.45) / 0.22], "they look normalised. Leave Normalize out"),
        ([CALIBRATION[:, :1]], r"\(batch, 3, 16, 16\), channels first; found torch.float32 of shape \(12, 1, 16, 16\)"),
        ([CALIBRATION[:, :, :8]], r"of shape \(12, 3, 8, 16\)"),
        (CALIBRATION, r"\(batch, 3, 16, 16\), channels first; found torch.float32 of shape \(3, 16, 16\)"),
        ([CALIBRATION[:2], CALIBRATION[:1]], "Calibration needs at least 4 images; found 3"),
        ([], "Calibration needs at least 4 images; found 0"),
    ],
)
def test_calibration_images_that_cannot_be_used_are_refused_before_a_source_runs(
    pool: Pool, images: object, words: str
) -> None:
    with images_seen(pool.parts[0].source) as seen, pytest.raises(CalibrationError, match=words):
        pool.search(images, never())  # type: ignore[arg-type]
    assert seen == []


def test_selection_images_that_cannot_be_used_are_refused(pool: Pool) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        pool.search([CALIBRATION], [(IMAGES * math.nan, LABELS)])
    with pytest.raises(CalibrationError, match="they look normalised"):
        pool.search([CALIBRATION], [((IMAGES - 0.5) / 0.5, LABELS)])
    with pytest.raises(CalibrationError, match=r"found a dict with the keys \['image', 'label'\]"):
        pool.search([CALIBRATION], [{"image": IMAGES, "label": LABELS}])
    with pytest.raises(CalibrationError, match="There are no images"):
        pool.search([CALIBRATION], [])
    with pytest.raises(CalibrationError, match="at least two classes"):
        pool.search([CALIBRATION], [(IMAGES, LABELS * 0)])


def test_an_unknown_ranking_is_refused_before_any_image_is_read(pool: Pool) -> None:
    with pytest.raises(StitchError, match=r"Unknown ranking 'best'; choose from \['auto', 'loo_soft_r2'"):
        pool.search(never(), never(), ranking="best")


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(IMAGES, LABELS, strict=True))


@pytest.mark.parametrize(
    ("selection", "total"),
    [(SELECTION, 40), (DataLoader(Stream(), batch_size=16), None), ([(IMAGES, LABELS)], None)],
)
def test_progress_is_told_stage_by_stage(pool: Pool, selection: DataLoader, total: int | None) -> None:
    recorder = Recorder()
    result = pool.search([CALIBRATION], selection, max_candidates=5, progress=recorder)
    assert recorder.stages == [("calibrating", 2, 2), ("composing", 5, 5), ("ranking", total, 40)]
    assert sum(r.candidate.kind in ("stitched", "shortened") for r in result.ranked) == 5


def test_seconds_are_those_of_the_search_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("lightning_stitch.progress.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    pool = pool_of()
    first, second = (pool.search([CALIBRATION], SELECTION, max_roots=1, max_candidates=1).seconds for _ in range(2))
    # The cutting in the constructor and the costs of the search are one stage.
    assert first == second == {"cut": 2.0, "calibrate": 1.0, "search": 1.0, "rank": 1.0}


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (torch.tensor([0, 1, 1_000_000] * 4), {}, "label 1000000, but there can hardly be more than 50000 classes"),
        (torch.arange(12), {"num_classes": 3}, "label 11, but there are 3 classes"),
        (["cat", "dog"] * 6, {}, r"a tensor of class numbers; found list \('cat'\).*CalibrationDataModule"),
        (None, {}, "a tensor of class numbers; found NoneType"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused_before_a_source_runs(
    pool: Pool, labels: object, options: dict[str, int], words: str
) -> None:
    images = torch.rand(12, *pool.image_shape, generator=torch.Generator().manual_seed(0))
    with images_seen(pool.parts[0].source) as seen, pytest.raises(CalibrationError, match=words):
        pool.search([images], [(images, labels)], **options)
    assert seen == []


def test_images_that_chose_are_not_run_again_for_what_some_budget_would_choose() -> None:
    pool = Pool([plain("a", (8, 8, 8), seed=0), plain("b", (4, 12, 12), seed=1)], (3, 16, 16))
    result = pool.search([CALIBRATION], SELECTION, max_candidates=4)
    images = torch.cat([batch[0] for batch in SELECTION])
    kept = [result.best, *(r for r in result.ranked if r.candidate.kind in ("source", "self-stitched"))]
    candidates = [ranked.candidate for ranked in kept]
    seen: list[int] = []
    hooks = [
        part.preprocess.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        for part in pool.parts
    ]
    # In other batches and another order, and some twice.
    again, _ = pool.outcomes(candidates, [images.flip(0)[:7], images[:3]], progress=Silent())
    assert not seen
    pool.outcomes(candidates, [torch.cat([images[:3], CALIBRATION[:1]])], progress=Silent())
    assert seen
    for hook in hooks:
        hook.remove()
    pool.remembered.keep([])
    fresh, _ = pool.outcomes(candidates, [torch.cat([images.flip(0)[:7], images[:3]])], progress=Silent())
    for one, other in zip(again, fresh, strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [False, True])
def test_an_extended_pool_is_one_that_had_the_source_from_the_start(tmp_path: Path, saved: bool) -> None:
    first, second = sources()
    extended = pool_of(first)
    extended.calibrate([CALIBRATION])
    if saved:
        extended.save(tmp_path)
        extended = Pool.open(tmp_path, [first])
    with images_seen(first) as seen:
        extended.extend(second, [CALIBRATION])
        assert not seen
    assert extended.calibration is not None
    result = extended.search(None, SELECTION, max_roots=1)
    whole = pool_of(first, second)
    whole.calibrate([CALIBRATION])
    assert records(result) == records(whole.search(None, SELECTION, max_roots=1))


def test_a_pool_is_extended_by_nothing_that_does_not_fit_and_stays_as_it_was() -> None:
    first, second = sources()
    pool = pool_of(first)
    pool.calibrate([CALIBRATION])
    with pytest.raises(StitchError, match="names of their own"):
        pool.extend(first, [CALIBRATION])
    with pytest.raises(CalibrationError, match="calibrated on other images"):
        pool.extend(second, [CALIBRATION.flip(0)])
    assert [part.name for part in pool.parts] == ["a"]
    pool.search([CALIBRATION], SELECTION)  # which lets go of its images
    with pytest.raises(CalibrationError, match="lets go of its images"):
        pool.extend(second, [CALIBRATION])
    with pytest.raises(StitchError, match="the same outputs"):
        pool_of(first, until="output").extend(plain("c", (4, 4, 4), seed=2, classes=5))


def test_a_pool_that_is_not_calibrated_is_extended_without_images() -> None:
    first, second = sources()
    pool = pool_of(first)
    pool.extend(second)
    assert records(pool.search([CALIBRATION], SELECTION)) == records(pool_of().search([CALIBRATION], SELECTION))
