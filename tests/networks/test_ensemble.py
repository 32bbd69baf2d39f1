from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.small_sources import donor, plain
from doubles.tensors import digits
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import (
    CalibrationError,
    CalibrationSettings,
    Pool,
    Recipe,
    RecipeError,
    RidgeHead,
    SearchResult,
    StitchedClassifier,
    StitchedNetwork,
    StitchError,
    ensemble,
    load_source,
    network_cost,
)
from lightning_stitch.recipe import Average, Tap
from lightning_stitch.stitching.candidates import Candidate

SIZE = (3, 32, 32)
IMAGES, LABELS = digits(72, 32, classes=3)
CALIBRATION, SELECTION, TRAIN = IMAGES[:16], [(IMAGES[16:40], LABELS[16:40])], [(IMAGES[40:], LABELS[40:])]
PROBES = IMAGES[:5]


@pytest.fixture(scope="module")
def pool() -> Pool:
    # Cuts behind a bare convolution, where a stitch is folded into that, and others.
    cuts = ["blocks.0", "blocks.1.0.conv_exp", "blocks.1", "blocks.2.0.conv_exp", "blocks.2", "blocks.3", "blocks"]
    settings = CalibrationSettings(readout="last", granularity={"test_efficientnet": cuts}, keep_activations="memory")
    return Pool([donor("test_resnet"), donor("test_efficientnet")], SIZE, settings=settings)


@pytest.fixture(scope="module")
def result(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], SELECTION, num_classes=3, heal=True, max_roots=1)


def candidates(result: SearchResult) -> list[Candidate]:
    return [ranked.candidate for ranked in result.ranked]


def separately(pool: Pool, members: Sequence[Candidate], heads: Sequence[nn.Module], mean: str) -> Tensor:
    """The members as networks of their own, their probabilities averaged: the reference."""
    with torch.no_grad():
        outputs = [head(pool.assemble(member)(PROBES)).double() for member, head in zip(members, heads, strict=True)]
    if mean == "arithmetic":
        return torch.stack([output.softmax(1) for output in outputs]).mean(0)
    product = torch.stack([output.softmax(1) for output in outputs]).log().mean(0).exp()
    return product / product.sum(1, keepdim=True)


def probabilities(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(PROBES).double().softmax(1)


# -- what it gives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_gives_the_mean_of_its_members(pool: Pool, result: SearchResult, mean: Any) -> None:
    members = candidates(result)
    assert {member.kind for member in members} >= {"source", "self-stitched", "early exit"}
    placements = {step.spec.placement for member in members for step in member.steps if step.spec is not None}
    assert placements == {"explicit", "producer", "consumer"}
    assert any(member.recipe.healed for member in members)
    network = ensemble(pool, members, TRAIN, mean=mean)
    expected = separately(pool, members, list(network.heads), mean)
    torch.testing.assert_close(probabilities(network), expected, atol=1e-5, rtol=1e-4)


def test_the_output_is_log_probabilities(pool: Pool, result: SearchResult) -> None:
    for mean in ("arithmetic", "geometric"):
        network = ensemble(pool, result, TRAIN, top=4, mean=mean)  # type: ignore[arg-type]
        with torch.no_grad():
            torch.testing.assert_close(network(PROBES).exp().sum(1), torch.ones(5))


def test_an_ensemble_of_one_is_that_network(pool: Pool, result: SearchResult) -> None:
    best = result.best.candidate
    for mean in ("arithmetic", "geometric"):
        network = ensemble(pool, [best], TRAIN, mean=mean)  # type: ignore[arg-type]
        assert (
            torch.equal(probabilities(network), separately(pool, [best], list(network.heads), "arithmetic"))
            or (probabilities(network) - separately(pool, [best], list(network.heads), "arithmetic")).abs().max() < 1e-6
        )


def test_the_best_of_a_result_are_its_members(pool: Pool, result: SearchResult) -> None:
    of_result = ensemble(pool, result, TRAIN, top=3)
    assert of_result.recipe == ensemble(pool, result.ranked[:3], TRAIN).recipe
    assert of_result.recipe.average == Average(((0,), (1,), (2,)), 3)


def test_heads_may_be_given(pool: Pool, result: SearchResult) -> None:
    heads = []
    for number, ranked in enumerate(result.ranked[:2]):
        head = RidgeHead(ranked.features, 4)
        nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(number))
        heads.append(head)
    members = candidates(result)[:2]
    network = ensemble(pool, members, heads=heads)
    torch.testing.assert_close(probabilities(network), separately(pool, members, heads, "arithmetic"))
    assert not {id(p) for p in network.parameters()} & {id(p) for head in heads for p in head.parameters()}


def test_members_that_end_at_outputs_need_no_heads() -> None:
    sources = [plain("a", (6, 8, 8), seed=1), plain("b", (6, 10, 8), seed=2)]
    pool = Pool(sources, SIZE, settings=CalibrationSettings(granularity="all", until="output"))
    found = pool.search([CALIBRATION], [IMAGES[16:40]])
    members = candidates(found)[:4]
    network = ensemble(pool, members)
    assert network.num_features == network.recipe.average.num_classes == 4
    expected = separately(pool, members, [nn.Identity()] * 4, "arithmetic")
    torch.testing.assert_close(probabilities(network), expected, atol=1e-6, rtol=1e-4)
    assert not network.recipe.average.with_heads
    assert not network.heads


# -- what is shared ------------------------------------------------------------------------------------------------


def stitched_from_one_front(pool: Pool) -> tuple[list[Candidate], str]:
    """Three networks that begin alike, up to a cut that no stitch is folded into: ways on behind it, and the cut."""
    front, back = pool.parts
    cut = "layer2"
    pool.calibrate([CALIBRATION])
    ends = [c.name for c in back.cuts if c.grid == front.graph.find(cut).grid]
    paths = [[(front.name, None, cut), (back.name, end, None)] for end in ends[:2]]
    return [pool.stitch([(front.name, None, None)]), *(pool.stitch(path) for path in paths)], cut


def test_what_members_begin_with_alike_runs_once_and_costs_once(pool: Pool) -> None:
    members, cut = stitched_from_one_front(pool)
    explicit = [as_explicit(member) for member in members]
    network = ensemble(pool, explicit, TRAIN)
    graph = pool.parts[0].graph
    alone = [nn.Sequential(pool.assemble(m), head) for m, head in zip(explicit, network.heads, strict=True)]
    costs = [network_cost(one, SIZE) for one in alone]
    shared_macs = graph.macs(None, cut)
    shared_params = sum(p.numel() for p in graph.parameters(None, cut))
    assert shared_macs > 0.2 * costs[0].macs
    together = network_cost(network, SIZE)
    assert together.macs == sum(cost.macs for cost in costs) - 2 * shared_macs
    assert together.params == sum(cost.params for cost in costs) - 2 * shared_params
    assert calls_of(network, "conv1.0") == 1


def as_explicit(candidate: Candidate) -> Candidate:
    """The same with stitches that are layers of their own, so that no fold touches what is shared."""
    steps = tuple(
        step
        if step.spec is None
        else dataclasses.replace(step, spec=dataclasses.replace(step.spec, placement="explicit"))
        for step in candidate.steps
    )
    return candidate.with_steps(steps)


def calls_of(network: nn.Module, layer: str) -> int:
    """How often the layers of that name run for one batch, whoever holds them."""
    ran: list[str] = []
    layers = [module for name, module in network.named_modules() if name.endswith(f".{layer}")]
    assert layers
    hooks = [module.register_forward_pre_hook(lambda *_: ran.append(layer)) for module in layers]
    probabilities(network)
    for hook in hooks:
        hook.remove()
    return len(ran)


def test_a_search_s_networks_together_are_cheaper_than_apart(pool: Pool, result: SearchResult) -> None:
    members = candidates(result)[:8]
    network = ensemble(pool, members, TRAIN)
    apart = sum(network_cost(pool.assemble(member), SIZE).macs for member in members)
    heads = sum(head.weight.numel() for head in network.heads)
    assert network_cost(network, SIZE).macs < 0.8 * (apart + heads)


def test_a_front_that_took_a_stitch_in_is_not_shared(pool: Pool) -> None:
    back, front = pool.parts
    pool.calibrate([CALIBRATION])
    cut = "blocks.2.0.conv_exp"
    ways = [pool.stitch([(front.name, None, cut), (back.name, c.name, None)]) for c in back.cuts[-3:]]
    folded = next(way for way in ways if way.steps[1].spec is not None and way.steps[1].spec.placement == "producer")
    members = [pool.stitch([(front.name, None, None)]), folded]
    network = ensemble(pool, members, TRAIN)
    expected = separately(pool, members, list(network.heads), "arithmetic")
    torch.testing.assert_close(probabilities(network), expected, atol=1e-6, rtol=1e-4)
    # Up to the cut before it is shared.
    assert (calls_of(network, "conv_exp"), calls_of(network, "blocks.0.0.conv")) == (3, 1)


def test_an_ensemble_owns_its_numbers(pool: Pool, result: SearchResult) -> None:
    network, other = (ensemble(pool, result, TRAIN, top=3) for _ in range(2))
    own = {p.data_ptr() for p in network.parameters()}
    assert not own & {p.data_ptr() for part in pool.parts for p in part.source.module.parameters()}
    assert not own & {p.data_ptr() for p in other.parameters()}
    assert all(p.requires_grad for p in network.parameters())


# -- saved, loaded, exported ---------------------------------------------------------------------------------------


def test_an_ensemble_is_rebuilt_from_json_and_numbers_without_sources(pool: Pool, result: SearchResult) -> None:
    network = ensemble(pool, candidates(result), TRAIN, mean="geometric")
    plain_recipe = json.loads(json.dumps(network.recipe.to_dict()))
    rebuilt = StitchedNetwork.from_recipe(Recipe.from_dict(plain_recipe))
    assert rebuilt.recipe == network.recipe
    assert not torch.equal(probabilities(rebuilt), probabilities(network))
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(probabilities(rebuilt), probabilities(network))


def test_a_classifier_s_checkpoint_holds_an_ensemble(pool: Pool, result: SearchResult, tmp_path: Path) -> None:
    network = ensemble(pool, result, TRAIN, top=3)
    model = StitchedClassifier(num_classes=3)
    model.install(network, nn.Identity())
    expected = probabilities(network)
    trainer = Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "ensemble.ckpt", weights_only=True).eval()
    assert torch.equal(probabilities(loaded), expected)
    # A module that was given another network before takes the checkpoint's.
    tested = StitchedClassifier(num_classes=3)
    trainer.test(
        tested,
        DataLoader(TensorDataset(*SELECTION[0]), batch_size=8),
        ckpt_path=str(tmp_path / "ensemble.ckpt"),
        weights_only=True,
        verbose=False,
    )
    assert torch.equal(probabilities(tested.eval()), expected)


def test_an_ensemble_is_exported_for_any_batch_size(pool: Pool, result: SearchResult) -> None:
    network = ensemble(pool, result, TRAIN, top=3)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (IMAGES[:2],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(probabilities(exported), probabilities(network))


def test_it_is_described_by_its_members_ways(pool: Pool) -> None:
    members, cut = stitched_from_one_front(pool)
    front, back = pool.parts
    network = ensemble(pool, members, TRAIN, mean="geometric")
    lines = network.describe().splitlines()
    assert lines[0] == "Ensemble of 3 networks (geometric mean), 4 fragments"
    assert lines[1].startswith(f"  1. {front.name}: image .. {cut}, ")
    assert lines[2].startswith(f"  2. {front.name}: {cut} .. {front.end}, ")
    assert lines[3].startswith(f"    read at {front.end}: ")
    assert lines[5].startswith(f"  3. {back.name}: ")
    assert ", behind 1, " in lines[5]
    ways = network.recipe.path.split(" | ")
    assert ways[0] == f"{front.name}: image .. {front.end}"
    assert ways[1].startswith(f"{front.name}: image .. {cut} -> {back.name}: ")


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_no_candidates_are_refused(pool: Pool) -> None:
    with pytest.raises(StitchError, match="at least one candidate; found none"):
        ensemble(pool, [], TRAIN)


def test_an_unknown_mean_is_refused(pool: Pool, result: SearchResult) -> None:
    with pytest.raises(
        StitchError,
        match=r"mean must be one of .*, or None for a joint head; found 'harmonic'",
    ):
        ensemble(pool, result, TRAIN, mean="harmonic")  # type: ignore[arg-type]


@pytest.mark.parametrize(("train", "words"), [(None, "need heads: give train="), ([IMAGES], "found images alone")])
def test_members_without_heads_and_labels_are_refused(
    pool: Pool, result: SearchResult, train: list[Tensor] | None, words: str
) -> None:
    with pytest.raises(CalibrationError, match=words):
        ensemble(pool, result, train)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([RidgeHead(4, 3)], "found 2 candidates and 1 heads"),
        ([RidgeHead(4, 3), RidgeHead(4, 2)], r"as many classes; found \['2', '3'\]"),
        ([nn.Linear(4, 3), RidgeHead(4, 3)], r"RidgeHeads of as many classes; found \['Linear', 'RidgeHead'\]"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    pool: Pool, result: SearchResult, heads: list[nn.Module], words: str
) -> None:
    with pytest.raises(StitchError, match=words):
        ensemble(pool, result.ranked[:2], heads=heads)


def recipe() -> Recipe:
    source = load_source("test_resnet", pretrained=False)
    pool = Pool([source], SIZE, settings=CalibrationSettings(readout="last"))
    pool.calibrate([CALIBRATION])
    members = [
        pool.stitch([("test_resnet", None, None)]),
        pool.stitch([("test_resnet", None, "layer1"), ("test_resnet", "layer3", None)]),
    ]
    return ensemble(pool, members, TRAIN).recipe


RECIPE = recipe()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": "harmonic"}, "mean is 'harmonic'"),
        ({"members": []}, "read taps 0 to 1, one at least; found"),
        ({"members": [[0], [9]]}, "read taps 0 to 1, one at least; found"),
        ({"members": [[0], []]}, "read taps 0 to 1, one at least; found"),
        ({"with_heads": False}, r"over 3 classes needs members of that width, or heads; found \{\d+\}"),
        ({"num_classes": "3"}, "num_classes is '3'; expected int"),
        ({"num_classes": 0}, "An average over 0 classes"),
        ({"color": "red"}, "unexpected keyword argument 'color'"),
    ],
)
def test_a_damaged_average_is_refused(changes: dict[str, Any], words: str) -> None:
    damaged = RECIPE.to_dict()
    damaged["average"].update(changes)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(damaged)


@pytest.mark.parametrize(
    ("number", "changes", "words"),
    [
        (0, {"parent": 1}, "stands behind its parent; fragment 0 has parent 1"),
        (1, {"parent": None}, "without a parent begins at the image"),
        (2, {"stitch": None, "parent": 0}, "Nothing joins test_resnet: image .. layer1 to test_resnet: layer3"),
        (2, {"source": "other"}, r"Fragments refer to \['other'\]"),
    ],
)
def test_fragments_that_do_not_meet_are_refused(number: int, changes: dict[str, Any], words: str) -> None:
    fragments = list(RECIPE.fragments)
    fragments[number] = dataclasses.replace(fragments[number], **changes)
    with pytest.raises(RecipeError, match=words):
        dataclasses.replace(RECIPE, fragments=tuple(fragments))


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        (Tap(9, 8), "Taps are at fragments 0 to 2; found 9"),
        (Tap(0, 0), "found Tap"),
        (Tap(0, 8, ("mean", "mean")), "each statistic once"),
        (Tap(0, 8, ("prefix",)), "prefix tokens if there are"),
    ],
)
def test_taps_that_read_nothing_are_refused(tap: Tap, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        dataclasses.replace(RECIPE, taps=(*RECIPE.taps, tap))


def test_a_fragment_that_nothing_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"No fragment and no tap is behind test_resnet: layer3"):
        dataclasses.replace(RECIPE, taps=RECIPE.taps[:1], average=None)


def test_a_tap_of_another_width_than_its_source_has_is_refused() -> None:
    wider = dataclasses.replace(RECIPE, taps=tuple(dataclasses.replace(tap, channels=7) for tap in RECIPE.taps))
    with pytest.raises(RecipeError, match=r"reads 7 channels at the end of test_resnet: .*; its source has \d+"):
        StitchedNetwork.from_recipe(wider)


def test_a_cut_that_the_architecture_does_not_have_is_refused() -> None:
    fragment = dataclasses.replace(RECIPE.fragments[0], end="layer9")
    only = dataclasses.replace(RECIPE, fragments=(fragment,), taps=(Tap(0, 4),), average=None)
    with pytest.raises(RecipeError, match="does not fit its sources: No cut is named 'layer9'"):
        StitchedNetwork.from_recipe(only)


# -- features side by side -----------------------------------------------------------------------------------------


def test_a_joint_head_reads_the_members_features_side_by_side(pool: Pool, result: SearchResult) -> None:
    members = candidates(result)[:4]
    network = ensemble(pool, members, mean=None)
    with torch.no_grad():
        separate = torch.cat([pool.assemble(member)(PROBES) for member in members], dim=1)
        torch.testing.assert_close(network(PROBES), separate, atol=1e-5, rtol=1e-4)
    assert network.num_features == separate.shape[1]
    rebuilt = StitchedNetwork.from_recipe(Recipe.from_dict(network.recipe.to_dict()))
    rebuilt.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(PROBES), network(PROBES))


def test_a_joint_head_takes_no_members_heads(pool: Pool, result: SearchResult) -> None:
    with pytest.raises(StitchError, match=r"mean=None gives features .* neither heads= nor train="):
        ensemble(pool, result, TRAIN, mean=None)
