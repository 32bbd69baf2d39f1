from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from doubles.pools import pieces_run
from doubles.small_sources import donor, live, plain, shake
from doubles.tensors import digits, noise
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from lightning_stitch import (
    Budget,
    BudgetError,
    CalibrationError,
    CalibrationSettings,
    Pool,
    StitchedNetwork,
    StitchError,
    network_cost,
)
from lightning_stitch.composing import Composition, compose_personal
from lightning_stitch.composing.cross_fitting import cross_fitted_vectors, deal_into_folds
from lightning_stitch.heads.ridge import fit_ridge_head
from lightning_stitch.search.results import pick

IMAGES, LABELS = digits(40, 32, classes=3)
MINE, MY_LABELS = IMAGES[:24], LABELS[:24]
YOURS, YOUR_LABELS = IMAGES[24:], LABELS[24:]


def prepared(**options: Any) -> Pool:
    sources = [donor("test_resnet"), donor("test_efficientnet"), plain("plain", (8, 12, 16), seed=3)]
    return Pool.prepare(sources, (3, 32, 32), **options)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return prepared()


def numbers(found: Composition) -> list[tuple[str, Tensor]]:
    return [(name, x.clone()) for name, x in found.network.state_dict().items()]


def record(found: Composition) -> list[tuple[object, ...]]:
    """All but the seconds."""
    return [(r.candidate.kind, r.candidate.recipe.to_dict(), r.scores) for r in found.result.ranked]


def assert_same(one: Composition, other: Composition) -> None:
    assert record(one) == record(other)
    for (name, x), (other_name, y) in zip(numbers(one), numbers(other), strict=True):
        assert name == other_name
        assert torch.equal(x, y)


# -- what comes out ------------------------------------------------------------------------------------------------


def test_with_labels_a_classifier_in_their_words_comes_out(pool: Pool) -> None:
    names = [["zero", "one", "two"][label] for label in MY_LABELS.tolist()]
    found = compose_personal(pool, MINE, names)
    assert found.classes == ("one", "two", "zero")
    assert not found.network.training
    with torch.no_grad():
        said = found.network(MINE).argmax(1)
    right = [found.classes[index] == name for index, name in zip(said.tolist(), names, strict=True)]
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize("budget", [None, 0.999])
def test_the_head_is_the_closed_form_head_on_the_final_networks_features(budget: float | None) -> None:
    settings = CalibrationSettings(granularity="stages", until="output")  # without early exits
    pool = Pool.prepare([donor("test_resnet"), donor("test_efficientnet")], (3, 32, 32), settings=settings)
    limit = None if budget is None else budget * min(part.cost.macs for part in pool.parts)
    found = compose_personal(pool, MINE, MY_LABELS, budget=Budget(max_macs=limit))
    assert found.result.best.candidate.kind in (("source",) if budget is None else ("stitched", "shortened"))
    with torch.no_grad():
        features = found.network[0](MINE)
    expected, _ = fit_ridge_head(features, MY_LABELS, num_classes=3)
    probes = features.flip(0) + 0.1
    torch.testing.assert_close(found.network[1](probes).softmax(1), expected(probes).softmax(1), atol=1e-3, rtol=0)


def test_without_labels_features_come_out(pool: Pool) -> None:
    found = compose_personal(pool, MINE)
    assert found.classes == ()
    with torch.no_grad():
        assert found.network(YOURS).shape == (len(YOURS), found.result.best.features)
    assert next(iter(found.result.best.scores)) == "consensus"


@pytest.mark.parametrize("until", ["features", "output"])
def test_with_classes_a_sources_own_outputs_are_restricted_to_them(until: str) -> None:
    sources = [donor("test_resnet"), donor("test_efficientnet")]
    pool = Pool.prepare(sources, (3, 32, 32), settings=CalibrationSettings(granularity="stages", until=until))
    found = compose_personal(pool, MINE, classes=[281, 7, 30])
    assert found.classes == (281, 7, 30)
    assert "early exit" not in {r.candidate.kind for r in found.result.ranked}
    best = found.result.best.candidate
    assert best.kind == "source"
    part = next(part for part in pool.parts if part.name == best.recipe.fragments[0].source)
    with torch.no_grad():
        expected = part.source.module(part.preprocess(YOURS))[:, [281, 7, 30]]
        torch.testing.assert_close(found.network(YOURS), expected)


def test_a_stitched_network_for_classes_ends_in_its_last_sources_classifier() -> None:
    sources = [donor("test_resnet"), donor("test_efficientnet")]
    pool = Pool.prepare(sources, (3, 32, 32))
    limit = min(part.cost.macs for part in pool.parts) - 1
    found = compose_personal(pool, MINE, classes=[1, 2], budget=Budget(max_macs=limit))
    assert found.result.best.candidate.kind in ("stitched", "shortened")
    assert found.network[0].recipe.fragments[-1].end is None
    last = next(part for part in pool.parts if part.name == found.network[0].recipe.fragments[-1].source)
    body = pool.assemble(found.result.best.candidate)
    with torch.no_grad():
        features = body(YOURS)[:, -body.recipe.taps[-1].num_features :]
        expected = last.graph.fragment(last.end, None)(features)[:, [1, 2]]
        torch.testing.assert_close(found.network(YOURS), expected)


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_the_network_keeps_the_budget(pool: Pool, share: float) -> None:
    limit = share * min(part.cost.macs for part in pool.parts)
    found = compose_personal(pool, MINE, MY_LABELS, budget=Budget(max_macs=limit))
    assert network_cost(found.network[0], (3, 32, 32)).macs <= limit
    within = [r for r in found.result.ranked if r.candidate.cost.macs <= limit]
    assert found.result.best is pick(within, Budget())


def test_every_candidate_can_be_assembled_afterwards(pool: Pool) -> None:
    found = compose_personal(pool, MINE, MY_LABELS)
    assert {r.candidate.kind for r in found.result.ranked} - {"shortened"} == {"source", "early exit", "stitched"}
    for ranked in found.result.ranked:
        network = pool.assemble(ranked.candidate)
        assert isinstance(network, StitchedNetwork)
        with torch.no_grad():
            assert network(YOURS[:2]).shape == (2, ranked.features)


def test_a_pool_that_was_not_prepared_serves_as_well() -> None:
    sources = [donor("test_resnet"), plain("plain", (8, 12, 16), seed=3)]
    settings = CalibrationSettings(granularity="stages", rows_per_image=16)
    ordinary, ready = Pool(sources, (3, 32, 32), settings=settings), Pool.prepare(sources, (3, 32, 32))
    assert_same(compose_personal(ordinary, MINE, MY_LABELS), compose_personal(ready, MINE, MY_LABELS))


def test_images_are_those_that_the_first_source_was_trained_on_unless_said_otherwise() -> None:
    assert Pool.prepare([live(small(), "a", size=24)]).image_shape == (3, 24, 24)


def small() -> nn.Module:
    layers = (nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
    return shake(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), 0)


# -- images as they come -------------------------------------------------------------------------------------------


def as_list(images: Tensor) -> list[Tensor]:
    return list(images)


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def as_photographs(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in as_bytes(images)]


@pytest.mark.parametrize("given", [as_list, as_bytes, as_photographs])
def test_images_may_come_in_any_of_these_forms(pool: Pool, given: Any) -> None:
    exact = as_bytes(MINE).float() / 255
    assert_same(compose_personal(pool, given(exact), MY_LABELS), compose_personal(pool, exact, MY_LABELS))


def test_images_of_other_sizes_are_resized_to_the_pools(pool: Pool) -> None:
    larger = functional.interpolate(MINE, size=(48, 40), mode="bilinear")
    resized = functional.interpolate(larger, size=(32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    assert_same(compose_personal(pool, larger, MY_LABELS), compose_personal(pool, resized, MY_LABELS))


# -- honest scores -------------------------------------------------------------------------------------------------


def test_no_image_is_judged_through_a_stitch_that_was_fitted_on_it() -> None:
    pool = prepared()
    pool.calibrate([MINE])
    front, back = pool.parts[0], pool.parts[1]
    candidate = pool.stitch([(front.name, None, front.cuts[1].name), (back.name, back.cuts[1].name, None)])
    first = torch.cat(
        cross_fitted_vectors(
            candidate, pool.calibration.sources, pool.settings, fold_of=torch.arange(24) % 4, ridge=1e-3
        ),
        dim=1,
    )
    changed = MINE.clone()
    changed[5] = 1 - changed[5]
    pool.calibrate([changed])
    second = torch.cat(
        cross_fitted_vectors(
            candidate, pool.calibration.sources, pool.settings, fold_of=torch.arange(24) % 4, ridge=1e-3
        ),
        dim=1,
    )
    same_fold = torch.arange(24) % 4 == 5 % 4
    same_fold[5] = False
    torch.testing.assert_close(first[same_fold], second[same_fold])
    others = torch.arange(24) % 4 != 5 % 4
    assert ((first - second)[others].norm(dim=1) > 1e-3 * first[others].norm(dim=1)).all()


def test_cross_fitted_features_are_those_of_networks_fitted_on_the_other_images() -> None:
    sources = [plain("a", (8, 12, 16), seed=1), plain("b", (6, 10, 12), seed=2)]
    settings = CalibrationSettings(granularity=["0", "1"], rows_per_image=1024)
    pool = Pool(sources, (3, 32, 32), settings=settings)
    path = [("a", None, "0"), ("b", "1", None)]
    pool.calibrate([MINE])
    candidate = pool.stitch(path, ridge=1e-2)
    found = torch.cat(
        cross_fitted_vectors(candidate, pool.calibration.sources, settings, fold_of=torch.arange(24) % 3, ridge=1e-2),
        dim=1,
    )
    for fold in range(3):
        own = torch.arange(24) % 3 == fold
        pool.calibrate([MINE[~own]])
        network = pool.assemble(pool.stitch(path, ridge=1e-2))
        with torch.no_grad():
            torch.testing.assert_close(found[own], network(MINE[own]), atol=1e-3, rtol=1e-3)


def test_the_scores_of_a_source_are_its_leave_one_out_scores(pool: Pool) -> None:
    found = compose_personal(pool, MINE, MY_LABELS)
    ranked = found.result.best_source
    part = next(part for part in pool.parts if part.name == ranked.candidate.recipe.fragments[0].source)
    with torch.no_grad():
        features = pool.assemble(ranked.candidate)(MINE)
    assert part.end is not None
    assert ranked.scores["loo_accuracy"] == fit_ridge_head(features, MY_LABELS, num_classes=3)[1].loo_accuracy
    assert found.result.num_selection_labels == len(MINE)


@pytest.mark.parametrize("labels", [[0, 1] * 16, [0, 1, 2, 3] * 8])
def test_the_folds_tell_nothing_of_the_labels_whatever_the_order_of_these(pool: Pool, labels: list[int]) -> None:
    scores = []
    for seed in range(3):
        # Images that have nothing to do with their labels.
        ranked = compose_personal(pool, noise(32, 3, 32, 32, seed=seed), labels).result.ranked
        scores += [r.scores["loo_r2"] for r in ranked if r.candidate.kind == "stitched"]
    assert len(scores) > 10
    assert sum(scores) / len(scores) < 0.02


def test_each_class_is_spread_evenly_over_the_folds() -> None:
    labels = torch.tensor([0, 1] * 8 + [1] * 4)
    fold_of = deal_into_folds(20, labels, folds=4)
    counts = torch.zeros(4, 2, dtype=torch.long).index_put((fold_of, labels), torch.tensor(1), accumulate=True)
    assert counts.tolist() == [[2, 3]] * 4
    assert deal_into_folds(6, torch.tensor([3, 1, 0, 2, 5, 4]), folds=4).tolist() == [0, 1, 2, 3, 0, 1]
    assert deal_into_folds(6, None, folds=4).tolist() == [0, 1, 2, 3, 0, 1]


# -- what it costs -------------------------------------------------------------------------------------------------


def test_each_source_runs_once_over_the_images_whatever_the_number_of_candidates(pool: Pool) -> None:
    seen: list[int] = []
    hook = pool.parts[0].preprocess.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = compose_personal(pool, MINE, MY_LABELS)
    hook.remove()
    assert sum(seen) == len(MINE)
    assert len(found.result.ranked) > 10


@pytest.mark.parametrize("effort", [0.0, 0.2, 0.5, 2.0])
def test_stitched_candidates_run_no_more_than_the_effort_allows(pool: Pool, effort: float) -> None:
    found = compose_personal(pool, MINE, MY_LABELS, effort=effort)
    total = sum(part.cost.macs for part in pool.parts)
    tails = []
    for ranked in found.result.ranked:
        if ranked.candidate.kind == "stitched":
            tail = ranked.candidate.steps[-1]
            tails.append(pool.parts[tail.source].cost_between(tail.first, tail.last).macs)
    assert sum(tails) + max(tails, default=0) <= effort * total
    assert bool(tails) == (effort > 0)
    assert ("more to run than the effort allows" in found.result.rejected) == (effort < 0.5)


def test_an_impossible_budget_is_refused_before_anything_runs(pool: Pool) -> None:
    with pieces_run(pool) as ran, pytest.raises(BudgetError, match=r"No network keeps the budget of at most 1 M MACs|"):
        compose_personal(pool, MINE, MY_LABELS, budget=Budget(max_macs=10))
    assert ran == []


# -- requests share nothing ----------------------------------------------------------------------------------------


def test_requests_in_any_order_give_each_person_the_same_network() -> None:
    mine, yours = (MINE, MY_LABELS), (YOURS, YOUR_LABELS)
    one, other = prepared(), prepared()
    first = [compose_personal(one, *mine), compose_personal(one, *yours), compose_personal(one, *mine)]
    second = [compose_personal(other, *yours), compose_personal(other, *mine), compose_personal(other, *yours)]
    assert_same(first[0], first[2])
    assert_same(first[0], second[1])
    assert_same(first[1], second[0])
    assert_same(second[0], second[2])


def test_training_a_personal_network_touches_neither_the_pool_nor_other_networks(pool: Pool) -> None:
    mine, yours = compose_personal(pool, MINE, MY_LABELS), compose_personal(pool, MINE, MY_LABELS)
    before = numbers(yours)
    sources = [x.clone() for part in pool.parts for x in part.source.module.state_dict().values()]
    optimizer = torch.optim.SGD(mine.network.parameters(), lr=0.1)
    functional.cross_entropy(mine.network(MINE), MY_LABELS).backward()
    optimizer.step()
    assert any(not torch.equal(x, y) for (_, x), (_, y) in zip(numbers(mine), before, strict=True))
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(numbers(yours), before, strict=True))
    after = [x for part in pool.parts for x in part.source.module.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(sources, after, strict=True))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_no_tensor_outlives_a_request() -> None:
    compose_personal(prepared(), MINE, MY_LABELS)  # what is kept for all pools: which positions of a grid are sampled
    pool = prepared()
    before = live_tensors()
    for _ in range(2):
        found = compose_personal(pool, MINE, MY_LABELS)
        network = weakref.ref(found.network)
        assert live_tensors() > before
        del found
        assert live_tensors() == before
        assert network() is None


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([3, 7] * 12), (3, 7)),
        ([np.int64(3), np.int64(7)] * 12, (3, 7)),
        ([torch.tensor(3), torch.tensor(7)] * 12, (3, 7)),
        ([0.0, 1.0] * 12, (0, 1)),
        (torch.eye(2).repeat(12, 1), (0, 1)),
        (np.array([[3], [7]] * 12), (3, 7)),
        ([0, 1_000_000] * 12, (0, 1_000_000)),
        ([-1, 1] * 12, (-1, 1)),
        (np.array(["cup", "key"] * 12), ("cup", "key")),
    ],
)
def test_labels_of_any_kind_are_taken_for_what_they_are(pool: Pool, labels: Any, classes: tuple[Any, ...]) -> None:
    same = compose_personal(pool, MINE, ["a", "b"] * 12)
    found = compose_personal(pool, MINE, labels)
    assert found.classes == classes
    assert found.result.best.scores == same.result.best.scores


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (MINE[:3], None, "at least 4 images; found 3"),
        (MINE, [0, 1], "one label; found 24 images and 2 labels"),
        (MINE, [0] * 24, "at least two classes; all labels are 0"),
        (MINE, [0.5] * 24, r"The label of image 0: labels must be integers from 0, names, .*found 0\.5"),
        (MINE, dict.fromkeys(range(24), 1), "in the order of the images; found a mapping"),
        (MINE, [[1, 1]] * 24, "The label of image 0: a vector as a label must be one-hot"),
        (MINE, ["a", 1] * 12, r"all integers or all names; found \['int', 'str'\]"),
        (MINE * 300, MY_LABELS, r"Image 0: images must be float in \[0, 1\]"),
        ([*MINE[:4], "me.png"], None, r"Image 4 \(me.png\): .*No such file"),
        ([*MINE[:4], 3], None, "Image 4: an image is a PIL image, a tensor or a numpy array; found int"),
    ],
)
def test_images_and_labels_that_cannot_be_used_are_refused(
    pool: Pool, images: Any, labels: Sequence[Any] | None, words: str
) -> None:
    with pieces_run(pool) as ran, pytest.raises(CalibrationError, match=words):
        compose_personal(pool, images, labels)
    assert ran == []


@pytest.mark.parametrize("classes", [[1], [1, 1], [1, 1000], [-1, 2]])
def test_classes_that_the_sources_do_not_have_are_refused(classes: list[int]) -> None:
    pool = Pool.prepare([donor("test_resnet")], (3, 32, 32))
    with pytest.raises(StitchError, match=r"different indices of the sources' outputs, from 0 to 999; found \["):
        compose_personal(pool, MINE, classes=classes)


def test_classes_of_sources_with_different_outputs_are_refused(pool: Pool) -> None:
    with pytest.raises(StitchError, match=r"same outputs; found widths .*'plain': 4"):
        compose_personal(pool, MINE, classes=[0, 1])


def test_labels_and_classes_together_are_refused(pool: Pool) -> None:
    with pytest.raises(StitchError, match="labels= say already which classes there are"):
        compose_personal(pool, MINE, MY_LABELS, classes=[0, 1])


@pytest.mark.parametrize(("options", "words"), [({"ridge": 0.0}, "ridge=0.0"), ({"effort": -1.0}, "effort=-1.0")])
def test_numbers_out_of_range_are_refused(pool: Pool, options: dict[str, float], words: str) -> None:
    with pytest.raises(StitchError, match=f"ridge must be above 0 and effort at least 0; found .*{words}"):
        compose_personal(pool, MINE, MY_LABELS, **options)


@pytest.mark.parametrize("limit", ["max_latency_ms", "max_activation_bytes"])
def test_a_limit_on_what_is_measured_of_assembled_networks_is_refused(pool: Pool, limit: str) -> None:
    with pytest.raises(BudgetError, match=r"neither latencies nor activation bytes\. Limit max_macs instead"):
        compose_personal(pool, MINE, MY_LABELS, budget=Budget(**{limit: 5}))


def test_a_prepared_pool_needs_a_source() -> None:
    with pytest.raises(StitchError, match="at least one source"):
        Pool.prepare([])
