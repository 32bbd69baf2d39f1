from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles.outcomes import run_all, selection_of
from doubles.pools import bare_candidate as candidate
from doubles.pools import references, space_of
from doubles.references import left_out_predictions, left_out_r2
from doubles.small_sources import images_seen, plain
from doubles.tensors import digits, noise
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from torch import Tensor

from lightning_stitch.composing.personal import by_careful_r2
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import class_temperature
from lightning_stitch.io.journal import Answers
from lightning_stitch.maths.cka import linear_cka
from lightning_stitch.search.evaluation import outcomes
from lightning_stitch.search.ranking import NEED_LABELS, RANKINGS, find_ranking
from lightning_stitch.search.space import Filters, SearchSpace
from lightning_stitch.search.strategies import DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.candidates import Kind
from lightning_stitch.stitching.segments import Segmented

LABELS = torch.tensor([0, 1, 2] * 10)


def features(signal: float, seed: int, channels: int = 6) -> Tensor:
    """Features that tell the classes apart the better, the stronger the signal."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, channels, generator=generator)
    return signal * centres[LABELS] + torch.randn(len(LABELS), channels, generator=generator)


FEATURES = [features(signal, seed) for seed, signal in enumerate((0.3, 2.0, 0.0, 0.8, 0.5))]
SELECTION = selection_of(FEATURES, LABELS, [FEATURES[1]] * 5, 3)


ONE_HOT = np.eye(3)[LABELS.numpy()]


def test_leave_one_out_scores_are_those_of_fitting_again_without_each_image() -> None:
    scores = RANKINGS["loo_r2"]([candidate()] * 5, SELECTION)
    predictions = [left_out_predictions(x, ONE_HOT) for x in FEATURES]
    found = [score["loo_accuracy"] for score in scores]
    assert found == pytest.approx([float((p.argmax(1) == LABELS.numpy()).mean()) for p in predictions])
    assert [score["loo_r2"] for score in scores] == pytest.approx([left_out_r2(x, ONE_HOT) for x in FEATURES])
    for name in ("loo_accuracy", "loo_r2", "neg_loo_log_loss"):
        order = sorted(range(5), key=lambda i: scores[i][name])
        assert (order[0], order[-1]) == (2, 1), name
    # Where nothing can be learnt, no worse than guessing by much.
    assert scores[2]["neg_loo_log_loss"] == pytest.approx(-np.log(3), abs=0.1)
    assert scores[2]["loo_r2"] == pytest.approx(0, abs=0.1)


def test_softened_labels_are_half_what_the_sources_say_of_an_image_they_have_not_seen() -> None:
    a, b = FEATURES[1], FEATURES[3]
    said = [left_out_predictions(own, ONE_HOT) for own in (a, b)]
    soft = ONE_HOT / 2 + (said[0] + said[1]) / 4
    scores = RANKINGS["loo_soft_r2"](
        [candidate(source) for source in "aaabb"], selection_of(FEATURES, LABELS, [a, a, a, b, b], 3)
    )
    assert [score["loo_soft_r2"] for score in scores] == pytest.approx([left_out_r2(x, soft) for x in FEATURES])
    assert all(score["loo_soft_r2"] > score["loo_r2"] for score in scores[1::2])


def test_softened_labels_rank_better_than_few_labels_do() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    seen = torch.randn(40, 12, generator=generator) + labels[:, None] * 0.7
    strengths = torch.linspace(0.2, 3, 40)
    worse = [seen + torch.randn(40, 12, generator=generator) / strength for strength in strengths]
    selection = selection_of([seen, *worse], labels, [seen] * 41, 2)
    candidates = [candidate(kind="source"), *[candidate()] * 40]

    def spearman_of(ranking: str) -> float:
        scores = [next(iter(score.values())) for score in RANKINGS[ranking](candidates, selection)]
        return float(spearmanr(scores[1:], strengths)[0])

    assert spearman_of("loo_soft_r2") > spearman_of("loo_r2") + 0.05


@pytest.mark.parametrize(
    ("ranking", "names"),
    [
        ("loo_soft_r2", ["loo_soft_r2", "loo_r2", "loo_accuracy", "neg_loo_log_loss"]),
        ("loo_r2", ["loo_r2", "loo_accuracy", "neg_loo_log_loss"]),
        ("consensus", ["consensus", "agreement"]),
    ],
)
def test_a_rankings_own_score_comes_first_and_the_others_break_ties(ranking: str, names: list[str]) -> None:
    scores = RANKINGS[ranking]([candidate()] * 5, SELECTION)
    assert [list(score) for score in scores] == [names] * 5
    if "loo" in ranking:
        same = RANKINGS["loo_r2"]([candidate()] * 5, SELECTION)
        assert all(
            {name: one[name] for name in other} == pytest.approx(other) for one, other in zip(scores, same, strict=True)
        )


UNLABELLED = replace(SELECTION, targets=None, num_classes=None)


def test_agreement_is_the_debiased_cka_with_the_last_sources_own_features() -> None:
    scores = RANKINGS["consensus"]([candidate()] * 5, UNLABELLED)
    expected = [float(linear_cka(x, FEATURES[1])) for x in FEATURES]
    assert [score["agreement"] for score in scores] == pytest.approx(expected)
    assert scores[1]["agreement"] == pytest.approx(1)


def unit(x: Tensor) -> np.ndarray:
    centred = x.double() - x.double().mean(0)
    return (centred / centred.norm()).numpy()


def test_consensus_is_how_well_all_sources_own_features_are_predicted_each_weighing_the_same() -> None:
    a, b = FEATURES[1], features(2.0, 9, channels=11)
    selection = selection_of(FEATURES, None, [a, a, b, b, b], None)
    candidates = [candidate(source) for source in "aabbb"]
    found = [score["consensus"] for score in RANKINGS["consensus"](candidates, selection)]
    everything = np.concatenate([unit(a), unit(b)], axis=1)
    assert found == pytest.approx([left_out_r2(x, everything) for x in FEATURES], abs=1e-6)
    scaled = selection_of(FEATURES, None, [a, a, *[1000 * b + 5] * 3], None)
    assert [s["consensus"] for s in RANKINGS["consensus"](candidates, scaled)] == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("width", [120, 80])
def test_wide_features_count_by_their_64_leading_directions(width: int) -> None:
    wide = noise(90, width, seed=1) @ (noise(width, width, seed=2) - 0.5)
    narrow = wide[:, :5]
    (score,) = RANKINGS["consensus"]([candidate()], selection_of([narrow], None, [wide], None))
    assert score["consensus"] == pytest.approx(left_out_r2(narrow, PCA(64).fit_transform(unit(wide))), abs=1e-6)


def test_without_labels_no_candidate_scores_higher_than_the_best_source() -> None:
    a, b = features(1.0, 5), features(1.0, 6)
    both = torch.cat([a, b], dim=1)
    candidates = [candidate("a", kind="source"), candidate("b", kind="source"), candidate("b")]
    selection = selection_of([a, b, both], None, [a, b, b], None)
    scores = RANKINGS["consensus"](candidates, selection)
    alone = RANKINGS["consensus"]([candidate("b"), candidate("a")], selection_of([both, a], None, [b, a], None))
    assert alone[0]["consensus"] > alone[1]["consensus"] + 0.1
    assert scores[2]["consensus"] == max(scores[0]["consensus"], scores[1]["consensus"])
    assert scores[2]["agreement"] < scores[0]["agreement"] == pytest.approx(1)


def test_the_product_of_ckas_is_the_candidates_own() -> None:
    products = [0.3, 0.9, 0.5]
    found = RANKINGS["cka_product"]([candidate(product=p) for p in products], SELECTION)
    assert found == [{"cka_product": p} for p in products]


@pytest.mark.parametrize("ranking", NEED_LABELS)
def test_rankings_by_labels_need_labels(ranking: str) -> None:
    with pytest.raises(CalibrationError, match="needs labels for the selection images; use ranking='consensus'"):
        RANKINGS[ranking]([candidate()] * 5, replace(SELECTION, targets=None))


def test_agreement_says_whose_features_it_cannot_compare() -> None:
    selection = selection_of([torch.ones(30, 4)], None, [FEATURES[1]], None)
    with pytest.raises(CalibrationError, match=r"readout of source '0' on the selection images: .*is constant"):
        RANKINGS["consensus"]([candidate("resnet")], selection)


@pytest.mark.parametrize(("value", "problem"), [(0.1, "x is constant"), (torch.nan, "x has NaN or infinite values")])
def test_a_source_whose_own_features_say_nothing_is_named(value: float, problem: str) -> None:
    own = [FEATURES[0], torch.full((30, 6), value)]
    selection = selection_of(FEATURES[:2], None, own, None)
    with pytest.raises(CalibrationError, match=f"readout of source '1' on the selection images: {problem}"):
        RANKINGS["consensus"]([candidate("resnet"), candidate("vit")], selection)


def test_rankings_are_found_by_name() -> None:
    assert find_ranking("auto", labelled=True) is RANKINGS["loo_soft_r2"]
    assert find_ranking("auto", labelled=False) is RANKINGS["consensus"]
    for name, ranking in RANKINGS.items():
        assert find_ranking(name, labelled=False) is ranking

    def mine(candidates: object, selection: object) -> list[dict[str, float]]:
        return []

    assert find_ranking(mine, labelled=True) is mine
    with pytest.raises(
        StitchError, match=r"Unknown ranking 'accuracy'; choose from \['auto', 'loo_soft_r2', .*'cka_prod"
    ):
        find_ranking("accuracy", labelled=True)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
    return space_of(sources, digits(10, 16)[0], settings=CalibrationSettings(until="output"))


def parts(space: SearchSpace) -> list[Segmented]:
    return [source.parts for source in space.sources]


def test_a_prefix_tree_gives_what_each_candidate_gives_alone(space: SearchSpace) -> None:
    found = [*references(space), *DepthFirst(threshold=-9, edge_threshold=-9, max_fragments=3)(space)]
    images = noise(7, 3, 16, 16)
    together = run_all(found, parts(space), images.split(3))
    assert len(found) > 8
    for one, outcome in zip(found, together, strict=True):
        x = images
        with torch.no_grad():
            for step in one.steps:
                part = space.sources[step.source].parts
                x = part.preprocess(x) if step.stitch is None else step.stitch(x)
                for piece in part.pieces[step.first : step.last]:
                    x = piece(x)
        torch.testing.assert_close(outcome.features, x, rtol=1e-4, atol=1e-5)
        assert not outcome.features.is_inference()
        assert outcome.features.dtype == torch.float32
    alone = run_all(found[:1], parts(space), [images])[0]
    torch.testing.assert_close(alone.features, together[0].features, rtol=1e-4, atol=1e-5)


def test_shared_fronts_run_once(space: SearchSpace) -> None:
    found = [*references(space), *DepthFirst(threshold=-9, edge_threshold=-9, max_fragments=3)(space)]
    starts = [candidate.steps[0].source for candidate in found]
    assert min(starts.count(0), starts.count(1)) > 2
    one, other = (source.parts.source for source in space.sources)
    with images_seen(one) as first, images_seen(other) as second:
        run_all([*found, found[0]], parts(space), noise(8, 3, 16, 16).split(3))
    assert sum(first) == sum(second) == 8


def test_seconds_are_what_a_candidate_costs_alone(space: SearchSpace) -> None:
    start = space.starts()[0]
    edge = space.edges(start, 0, space.sources[0].activations[0], Filters(min_cka=-9, min_product=-9))[0]
    longer = space.complete(space.enter(edge, space.sources[0].activations[0]))
    both = [space.complete(start), longer]
    shorter, behind = (outcome.seconds for outcome in run_all(both, parts(space), [noise(4, 3, 16, 16)]))
    assert min(shorter, behind) > 0
    # Time adds up from batch to batch, not from run to run.
    many = [outcome.seconds for outcome in run_all(both, parts(space), [noise(4, 3, 16, 16)] * 20)]
    again = [outcome.seconds for outcome in run_all(both, parts(space), [noise(4, 3, 16, 16)])]
    assert all(once < often for once, often in zip(again, many, strict=True))


def test_outcomes_of_batches_are_joined_and_told_of_as_they_come(space: SearchSpace) -> None:
    images, seen = noise(9, 3, 16, 16), list[int]()
    candidates = references(space)
    joined = outcomes(candidates, parts(space), images.split(4), journal=Answers(), on_batch=seen.append)
    assert seen == [4, 4, 1]
    for one, expected in zip(joined, run_all(candidates, parts(space), images.split(4)), strict=True):
        assert torch.equal(one.features, expected.features)
        assert one.seconds > 0
    with pytest.raises(CalibrationError, match="no images to run the candidates on"):
        outcomes(candidates, parts(space), [], journal=Answers(), on_batch=seen.append)


def test_the_loss_of_an_image_is_the_cross_entropy_of_its_softened_classes_with_calibrated_probabilities() -> None:
    own = [FEATURES[1], FEATURES[3], FEATURES[1], FEATURES[1]]
    kinds: tuple[Kind, ...] = ("source", "source", "stitched", "stitched")
    candidates = [candidate(source, kind=kind) for source, kind in zip("abaa", kinds, strict=True)]
    selection = selection_of(own[:2] + FEATURES[2:4], LABELS, own, 3)
    scores = RANKINGS["loo_soft_r2"](candidates, selection)

    def probabilities(x: Tensor, wanted: np.ndarray = ONE_HOT) -> np.ndarray:
        left_out = torch.as_tensor(left_out_predictions(x, ONE_HOT))
        return (class_temperature(left_out, torch.as_tensor(wanted)) * left_out).softmax(1).numpy()

    softened = (ONE_HOT + sum(probabilities(x) for x in own[:2]) / 2) / 2
    for number, (x, score) in enumerate(zip(own[:2] + FEATURES[2:4], scores, strict=True)):
        expected = -(softened * np.log(probabilities(x, softened))).sum(1) / len(x)
        np.testing.assert_allclose(selection.losses[number], expected, rtol=1e-3, atol=1e-6)
        assert score["neg_loo_log_loss"] == pytest.approx(
            np.log(probabilities(x))[ONE_HOT.astype(bool)].mean(), rel=1e-3
        )


def test_careful_r2_takes_off_two_standard_errors_of_the_lead_over_the_best_source() -> None:
    kinds: tuple[Kind, ...] = ("source", "source", "stitched", "early exit", "stitched")
    candidates = [candidate(source, kind=kind) for source, kind in zip("abaab", kinds, strict=True)]
    own = [FEATURES[1], FEATURES[3], FEATURES[1], FEATURES[1], FEATURES[3]]
    scores = by_careful_r2(candidates, selection_of(own[:2] + FEATURES[2:], LABELS, own, 3))
    soft = (ONE_HOT + sum(left_out_predictions(x, ONE_HOT) for x in own[:2]) / 2) / 2
    total = ((soft - soft.mean(0)) ** 2).sum()
    errors = [((left_out_predictions(x, soft) - soft) ** 2).sum(1) / total for x in own[:2] + FEATURES[2:]]
    for score, kind, error in zip(scores, kinds, errors, strict=True):
        lead = errors[0] - error
        spread = 0.0 if kind == "source" else np.sqrt(len(lead)) * lead.std(ddof=1)
        assert score["loo_soft_r2"] == pytest.approx(1 - error.sum(), abs=1e-6)
        assert next(iter(score.items())) == ("careful_r2", pytest.approx(1 - error.sum() - 2 * spread, abs=1e-6))


def test_by_careful_r2_noise_does_not_come_before_a_source_and_a_clear_lead_does() -> None:
    source, better = features(0.3, 3), features(3.0, 1)
    given = [source, *(features(0.3, seed) for seed in range(4, 34)), better]
    candidates = [candidate(kind="source"), *[candidate()] * 31]
    selection = selection_of(given, LABELS, [source] * 32, 3)
    plain_scores = [score["loo_soft_r2"] for score in RANKINGS["loo_soft_r2"](candidates, selection)]
    careful = [score["careful_r2"] for score in by_careful_r2(candidates, selection)]
    assert max(plain_scores[1:-1]) > plain_scores[0]
    assert max(careful[1:-1]) < careful[0] == plain_scores[0]
    assert careful[-1] > careful[0]
