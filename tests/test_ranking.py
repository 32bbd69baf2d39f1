from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digits, images_seen, noise, plain, space_of
from sklearn.linear_model import Ridge
from torch import Tensor

from lightning_stitch.candidates import Candidate
from lightning_stitch.cost import Cost
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.functional import linear_cka
from lightning_stitch.heads import DEFAULT_STRENGTHS
from lightning_stitch.paths import references
from lightning_stitch.prefix_tree import PrefixTree
from lightning_stitch.ranking import RANKINGS, SelectionData, find_ranking
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef
from lightning_stitch.search import DepthFirst
from lightning_stitch.segments import CalibrationSettings
from lightning_stitch.space import SearchSpace

LABELS = torch.tensor([0, 1, 2] * 10)


def candidate(source: str = "a", product: float = 1.0) -> Candidate:
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    ref = SourceRef(source, source, "timm", source, "sha256:0", preprocessing)
    recipe = Recipe((ref,), (FragmentRef(source, None, None),), scores={"cka_product": product})
    return Candidate(recipe, "stitched", (), Cost(1, 1))


def features(signal: float, seed: int, channels: int = 6) -> Tensor:
    """Features that tell the classes apart the better, the stronger the signal."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, channels, generator=generator)
    return signal * centres[LABELS] + torch.randn(len(LABELS), channels, generator=generator)


FEATURES = [features(signal, seed) for seed, signal in enumerate((0.3, 2.0, 0.0, 0.8, 0.5))]
SELECTION = SelectionData(FEATURES, LABELS, [FEATURES[1]] * 5, 3)


def left_out_predictions(x: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """Ridge regression on one-hot targets, fitted again without each row."""
    one_hot = np.eye(3)[labels]
    centred = x - x.mean(0)
    alpha = strength * (centred**2).sum() / min(len(x) - 1, x.shape[1])
    rows = np.arange(len(x))
    fits = [Ridge(alpha=alpha).fit(x[rows != i], one_hot[rows != i]) for i in rows]
    return np.stack([fit.predict(x[i : i + 1])[0] for i, fit in enumerate(fits)])


def brute_force_accuracy(x: Tensor) -> float:
    labels = LABELS.numpy()
    predictions = [left_out_predictions(x.double().numpy(), labels, s) for s in DEFAULT_STRENGTHS]
    best = min(predictions, key=lambda p: float(((p - np.eye(3)[labels]) ** 2).sum()))
    return float((best.argmax(1) == labels).mean())


def test_leave_one_out_accuracy_is_that_of_fitting_again_without_each_image() -> None:
    scores = RANKINGS["loo_accuracy"]([candidate()] * 5, SELECTION)
    assert [list(score) for score in scores] == [["loo_accuracy", "neg_loo_log_loss"]] * 5
    found = [score["loo_accuracy"] for score in scores]
    assert found == pytest.approx([brute_force_accuracy(x) for x in FEATURES])
    assert np.argmax(found) == 1
    assert np.argmin(found) == 2


def test_leave_one_out_log_loss_orders_by_probability_and_prefers_the_more_separable() -> None:
    scores = RANKINGS["loo_log_loss"]([candidate()] * 5, SELECTION)
    assert [list(score) for score in scores] == [["neg_loo_log_loss", "loo_accuracy"]] * 5
    assert scores == [
        {"neg_loo_log_loss": s["neg_loo_log_loss"], "loo_accuracy": s["loo_accuracy"]}
        for s in RANKINGS["loo_accuracy"]([candidate()] * 5, SELECTION)
    ]
    order = sorted(range(5), key=lambda i: -scores[i]["neg_loo_log_loss"])
    assert order[0] == 1
    assert all(score["neg_loo_log_loss"] < 0 for score in scores)
    # No worse than guessing by much, where nothing can be learnt.
    assert scores[2]["neg_loo_log_loss"] == pytest.approx(-np.log(3), abs=0.1)


def test_agreement_is_the_debiased_cka_with_the_last_sources_own_features() -> None:
    scores = RANKINGS["agreement"]([candidate()] * 5, replace(SELECTION, targets=None, num_classes=None))
    expected = [float(linear_cka(x, FEATURES[1])) for x in FEATURES]
    assert [score["agreement"] for score in scores] == pytest.approx(expected)
    assert scores[1]["agreement"] == pytest.approx(1)


def test_the_product_of_ckas_is_the_candidates_own() -> None:
    products = [0.3, 0.9, 0.5]
    found = RANKINGS["cka_product"]([candidate(product=p) for p in products], SELECTION)
    assert found == [{"cka_product": p} for p in products]


@pytest.mark.parametrize("ranking", ["loo_accuracy", "loo_log_loss"])
def test_rankings_by_labels_need_labels(ranking: str) -> None:
    with pytest.raises(CalibrationError, match="needs labels for the selection images; use ranking='agreement'"):
        RANKINGS[ranking]([candidate()] * 5, replace(SELECTION, targets=None))


def test_agreement_says_whose_features_it_cannot_compare() -> None:
    selection = replace(SELECTION, features=[torch.ones(30, 4)], own_features=[FEATURES[1]])
    with pytest.raises(CalibrationError, match=r"features of source 'resnet' on the selection images: x is constant"):
        RANKINGS["agreement"]([candidate("resnet")], selection)


def test_rankings_are_found_by_name() -> None:
    assert find_ranking("auto", labelled=True) is RANKINGS["loo_accuracy"]
    assert find_ranking("auto", labelled=False) is RANKINGS["agreement"]
    for name, ranking in RANKINGS.items():
        assert find_ranking(name, labelled=False) is ranking

    def mine(candidates: object, selection: object) -> list[dict[str, float]]:
        return []

    assert find_ranking(mine, labelled=True) is mine
    with pytest.raises(StitchError, match=r"Unknown ranking 'accuracy'; choose from \['auto', 'loo_accuracy', .*'cka"):
        find_ranking("accuracy", labelled=True)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
    return space_of(sources, digits(10, 16)[0], settings=CalibrationSettings(until="output"))


def tree(space: SearchSpace, candidates: list[Candidate]) -> PrefixTree:
    return PrefixTree(candidates, [source.parts for source in space.sources])


def test_a_prefix_tree_gives_what_each_candidate_gives_alone(space: SearchSpace) -> None:
    found = [*references(space), *DepthFirst(threshold=-9, edge_threshold=-9, max_fragments=3)(space)]
    images = noise(7, 3, 16, 16)
    together = tree(space, found).run(images.split(3))
    assert len(found) > 8
    for one, outcome in zip(found, together, strict=True):
        x = images
        with torch.no_grad():
            for step in one.steps:
                parts = space.sources[step.source].parts
                x = parts.preprocess(x) if step.stitch is None else step.stitch(x)
                for piece in parts.pieces[step.first : step.last]:
                    x = piece(x)
        torch.testing.assert_close(outcome.features, x, rtol=1e-4, atol=1e-5)
        assert not outcome.features.is_inference()
        assert outcome.features.dtype == torch.float32
    alone = tree(space, found[:1]).run([images])[0]
    torch.testing.assert_close(alone.features, together[0].features, rtol=1e-4, atol=1e-5)


def test_shared_fronts_run_once(space: SearchSpace) -> None:
    found = [*references(space), *DepthFirst(threshold=-9, edge_threshold=-9, max_fragments=3)(space)]
    starts = [candidate.steps[0].source for candidate in found]
    assert min(starts.count(0), starts.count(1)) > 2
    one, other = (source.parts.source for source in space.sources)
    with images_seen(one) as first, images_seen(other) as second:
        tree(space, [*found, found[0]]).run(noise(8, 3, 16, 16).split(3))
    assert sum(first) == sum(second) == 8


def test_seconds_are_what_a_candidate_costs_alone(space: SearchSpace) -> None:
    start = space.starts()[0]
    edge = space.edges(start, 0, space.sources[0].activations[0], min_cka=-9, min_product=-9)[0]
    longer = space.complete(space.enter(edge, space.sources[0].activations[0]))
    prefix_tree = tree(space, [space.complete(start), longer])
    seen: list[int] = []
    first = [outcome.seconds for outcome in prefix_tree.run([noise(4, 3, 16, 16)], on_batch=seen.append)]
    assert min(first) > 0
    assert seen == [4]
    # Time adds up from batch to batch.
    second = [outcome.seconds for outcome in prefix_tree.run([noise(4, 3, 16, 16)])]
    assert all(after > before for before, after in zip(first, second, strict=True))


def test_no_images_to_run_on_is_said(space: SearchSpace) -> None:
    with pytest.raises(CalibrationError, match="no images to run the candidates on"):
        tree(space, references(space)).run([])
