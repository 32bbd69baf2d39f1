from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from doubles.helpers import digits, live, noise, normal, path, pieces_run, records, references, shake, space_of
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting.copies import with_tensors
from lightning_stitch.errors import JournalError, StitchError
from lightning_stitch.healing.refinement import batch_norm_statistics, refined
from lightning_stitch.healing.trials import run_layerwise, run_on
from lightning_stitch.maths.regression import r2, ridge_least_squares
from lightning_stitch.networks.network import assemble
from lightning_stitch.recipe import FragmentRef, Recipe
from lightning_stitch.search.evaluation import PrefixTree
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.search.strategies import Beam
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate
from lightning_stitch.stitching.fitting import fit_rows

IMAGES = 0.7 * digits(16, 8)[0] + 0.3 * noise(16, 3, 8, 8)
SETTINGS = CalibrationSettings(rows_per_image=256, until="output")


def normed(name: str, seed: int) -> Source:
    """Three blocks of convolution, BatchNorm and ReLU; its cuts are "0", "1" and the vector "2"."""
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, s, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, s in ((3, 6, 1), (6, 8, 2), (8, 10, 1))
    ]
    pooled = nn.Sequential(*blocks[2], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return live(shake(nn.Sequential(blocks[0], blocks[1], pooled, nn.Linear(10, 4)), seed), name, size=8)


@cache
def space() -> SearchSpace:
    return space_of([normed("a", 0), normed("b", 1)], IMAGES, settings=SETTINGS)


def stitched(*fragments: tuple[str, str | None, str | None]) -> Candidate:
    return follow(space(), [FragmentRef(*fragment) for fragment in fragments])


def amplified(candidate: Candidate, factor: float) -> Candidate:
    """The candidate with what its last stitch gives multiplied."""
    step = candidate.steps[-1]
    assert step.stitch is not None
    spec = dataclasses.replace(step.stitch.spec, placement="explicit")
    stitch = type(step.stitch)(spec)
    stitch.load_state_dict({name: factor * x for name, x in step.stitch.state_dict().items()})
    steps = (*candidate.steps[:-1], dataclasses.replace(step, stitch=stitch))
    return dataclasses.replace(candidate, steps=steps)


def entering(candidate: Candidate, where: SearchSpace) -> list[Tensor]:
    first = candidate.steps[0]
    return list(where.sources[first.source].activations[first.last - 1])


def outputs(candidate: Candidate, where: SearchSpace) -> Tensor:
    tree = PrefixTree([candidate], [source.parts for source in where.sources])
    return tree.run([IMAGES])[0].features


# -- changing some tensors -------------------------------------------------------------------------------------------


def test_a_variant_has_its_own_numbers_and_shares_the_rest() -> None:
    piece = space().sources[0].parts.pieces[1]
    name = next(name for name, _ in piece.named_buffers() if name.endswith("running_mean"))
    before = piece.get_buffer(name).clone()
    variant = with_tensors(piece, {name: before + 1, "elsewhere.weight": torch.ones(1)})
    assert torch.equal(variant.get_buffer(name), before + 1)
    assert torch.equal(piece.get_buffer(name), before)
    shared = {id(p) for p in piece.parameters()} & {id(p) for p in variant.parameters()}
    assert len(shared) == sum(isinstance(m, nn.Conv2d) for m in piece.modules())
    assert not variant.training


def test_without_a_tensor_of_its_own_the_fragment_itself_is_given() -> None:
    piece = space().sources[0].parts.pieces[1]
    assert with_tensors(piece, {}) is piece
    assert with_tensors(piece, {"elsewhere.weight": torch.ones(1)}) is piece


def test_layer_by_layer_is_the_same_as_in_one_go_and_meets_every_layer_with_its_inputs() -> None:
    piece = space().sources[0].parts.pieces[0]
    met = []
    portions = [IMAGES[:10], IMAGES[10:]]
    with torch.no_grad():
        given = run_layerwise(piece, portions, lambda name, layer, inputs: met.append((type(layer), map(len, inputs))))
        assert [torch.equal(x, piece(images)) for x, images in zip(given, portions, strict=True)] == [True, True]
    assert [kind for kind, _ in met] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [list(sizes) for _, sizes in met] == [[10, 6]] * 3


# -- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_statistics_make_up_for_what_a_stitch_gives_in_another_scale(factor: float) -> None:
    candidate = stitched(("b", None, "0"), ("b", "0", None))
    perturbed = amplified(candidate, factor)
    found = refined(perturbed, space().sources, "batch_norm")
    assert found.recipe.refinements == ("batch_norm",)
    own = space().sources[1].features
    assert r2(outputs(found, space()), own) > r2(outputs(perturbed, space()), own) + 0.05
    # Whatever the scale, the first BatchNorm behind the stitch gives the same.
    one, other = (refined(amplified(candidate, k * factor), space().sources, "batch_norm") for k in (1, 2))
    assert torch.allclose(outputs(one, space()), outputs(other, space()), atol=1e-3)


def test_a_source_stitched_to_itself_without_loss_keeps_its_statistics() -> None:
    exact = space_of([normed("a", 0)], IMAGES, settings=SETTINGS, ridge=0.0)
    candidate = references(exact)[1]
    found = batch_norm_statistics(candidate, exact.sources, entering(candidate, exact))
    layers = dict(exact.sources[0].parts.source.module.named_buffers())
    names = [name for numbers in found for name in numbers]
    assert len(names) == 4
    for numbers in found:
        for name, x in numbers.items():
            assert torch.allclose(x, layers[name], atol=1e-3)


def test_statistics_are_matched_to_those_of_the_source_on_the_same_images() -> None:
    candidate = amplified(stitched(("a", None, "0"), ("b", "0", None)), 3.0)
    numbers = batch_norm_statistics(candidate, space().sources, entering(candidate, space()))
    assert list(numbers[0]) == []
    with_numbers = dataclasses.replace(
        candidate, steps=tuple(dataclasses.replace(s, tensors=n) for s, n in zip(candidate.steps, numbers, strict=True))
    )
    source = space().sources[1]
    normalised: dict[str, list[Tensor]] = {"source": [], "network": []}

    def note(where: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            normalised[where].append(output)

        return hook

    graphs = {s.name: s.parts.graph for s in space().sources}
    stitches = [step.stitch for step in candidate.steps[1:]]
    network = assemble(candidate.recipe, graphs, stitches, [step.tensors for step in with_numbers.steps])
    for where, module in (("source", source.parts.source.module), ("network", network.fragments[1])):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.register_forward_hook(note(where))
    with torch.no_grad():
        network(IMAGES)
        source.parts.source.module(source.parts.preprocess(IMAGES))
    for ours, theirs in zip(normalised["network"], normalised["source"][-2:], strict=True):
        assert torch.allclose(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=1e-4)
        assert torch.allclose(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), atol=1e-4)


def test_statistics_behind_other_changes_are_those_of_the_network_as_it_is_changed() -> None:
    candidate = stitched(("a", None, "0"), ("b", "0", None))
    name = next(n for n, _ in space().sources[1].parts.pieces[1].named_parameters() if n.endswith("0.weight"))
    weight = space().sources[1].parts.pieces[1].get_parameter(name)
    steps = (candidate.steps[0], dataclasses.replace(candidate.steps[1], tensors={name: 3 * weight.detach()}))
    changed = dataclasses.replace(candidate, steps=steps)
    plain, tripled = (batch_norm_statistics(c, space().sources, entering(c, space())) for c in (candidate, changed))
    variances = [n for n in plain[1] if n.endswith("running_var")]
    assert torch.allclose(tripled[1][variances[0]], 9 * plain[1][variances[0]], rtol=1e-3)
    assert torch.allclose(tripled[1][variances[1]], plain[1][variances[1]], rtol=1e-3)


# -- kept only where it helps ----------------------------------------------------------------------------------------


def test_a_change_is_kept_exactly_where_held_out_images_are_explained_better() -> None:
    kept = []
    for candidate in Beam(width=3)(space()):
        sources, images = space().sources, entering(candidate, space())
        fitted, held_out = [torch.cat(images)[:12]], [torch.cat(images)[12:]]
        own = sources[candidate.steps[-1].source].features[12:]
        numbers = batch_norm_statistics(candidate, sources, fitted)
        steps = [dataclasses.replace(s, tensors=n) for s, n in zip(candidate.steps, numbers, strict=True)]
        changed = dataclasses.replace(candidate, steps=tuple(steps))
        with torch.no_grad():
            before, after = (r2(run_on(c, sources, held_out)[0], own) for c in (candidate, changed))
        found = refined(candidate, sources, "batch_norm")
        assert (found is not candidate) == (after > before)
        kept.append(found is not candidate)
    assert 0 < sum(kept) < len(kept)


def test_what_has_no_stitch_or_ends_early_stays_as_it_is() -> None:
    source, exit = references(space())[0], space().exit(space().starts()[0], 1)
    assert refined(source, space().sources, "batch_norm") is source
    assert refined(exit, space().sources, "batch_norm") is exit


def test_features_that_do_not_vary_over_the_held_out_images_leave_it_as_it_is() -> None:
    candidate = amplified(stitched(("a", None, "0"), ("b", "0", None)), 5.0)
    sources = [dataclasses.replace(s, features=torch.ones_like(s.features)) for s in space().sources]
    assert refined(candidate, sources, "batch_norm") is candidate


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_refined_network_is_assembled_with_its_numbers(share_weights: bool) -> None:
    fragments = (("a", None, "0"), ("b", "0", "1"), ("a", "1", None))
    candidate = refined(amplified(stitched(*fragments), 4.0), space().sources, "batch_norm")
    assert candidate.recipe.refinements
    recipe = Recipe.from_dict(dataclasses.replace(candidate.recipe, share_weights=share_weights).to_dict())
    graphs = {s.name: s.parts.graph for s in space().sources}
    stitches = [step.stitch for step in candidate.steps[1:]]
    network = assemble(recipe, graphs, stitches, [step.tensors for step in candidate.steps])
    with torch.no_grad():
        assert torch.allclose(network(IMAGES), outputs(candidate, space()), atol=1e-4)
    assert "batch_norm" in network.describe()


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("names", [("batch_norm",), ("healing",)])
def test_a_refined_network_can_be_trained_on(names: tuple[str, ...], share_weights: bool) -> None:
    pool = Pool([normed("a", 0), normed("b", 1)], (3, 8, 8), settings=SETTINGS)
    pool.calibrate([IMAGES])
    fragments = [("a", None, "0"), ("b", "0", "1"), ("a", "1", None)]
    candidate = refined(amplified(pool.stitch(fragments), 4.0), pool.calibrated, names[0], settings=SETTINGS)
    assert candidate.recipe.refinements == names
    network = pool.assemble(candidate, share_weights=share_weights).train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    network(IMAGES).square().mean().backward()
    optimizer.step()
    moved = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert {name for name, _ in network.named_parameters()} <= moved
    assert any(name.endswith("running_mean") for name in moved)


def test_a_pool_refines_what_it_found_before_it_ranks() -> None:
    pool = Pool([normed("a", 0), normed("b", 1)], (3, 8, 8), settings=SETTINGS)
    result = pool.search([IMAGES], [IMAGES.flip(3)], refinements=("batch_norm", "open_loop", "row_weights"))
    changed = [r for r in result.ranked if r.candidate.recipe.refinements]
    assert changed
    assert result.seconds["refine"] > 0
    for r in changed[:3]:
        with torch.no_grad():
            given = pool.assemble(r.candidate)(IMAGES)
        assert torch.allclose(given, outputs(r.candidate, space()), atol=1e-4)


def test_an_unknown_refinement_is_refused_before_anything_runs() -> None:
    pool = Pool([normed("a", 0)], (3, 8, 8), settings=SETTINGS)
    with pytest.raises(
        StitchError, match=r"Unknown refinements \['bn'\]; choose from \['batch_norm', 'healing', 'open_loop', 'r"
    ):
        pool.search([IMAGES], [IMAGES], refinements=("bn",))
    assert not pool.calibrated


# -- other fits of a stitch ------------------------------------------------------------------------------------------


def planted(num_rows: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Running rows, a receiver's, and what the sender's own source sends: the last explains the receiver exactly."""
    own = normal(num_rows, 4)
    y = own @ normal(4, 3, seed=1) + 1
    return own + 0.3 * normal(num_rows, 4, seed=2), y, own


def test_the_open_loop_is_taken_where_it_predicts_held_out_images_better() -> None:
    noisy, y, own = planted()
    few = noisy.clone()
    few[:24] += 5 * normal(24, 4, seed=3)  # rows of the fit alone are spoiled
    fit, held_out, name = fit_rows(few, y, num_images=8, ridge=1e-3, bias=True, open_loop=own)
    assert name == "open_loop"
    assert torch.equal(fit.weight, ridge_least_squares(own, y, ridge=1e-3).weight)
    partial = ridge_least_squares(own[:24], y[:24], ridge=1e-3)
    assert partial.bias is not None
    assert held_out == pytest.approx(r2(few[24:] @ partial.weight.T + partial.bias, y[24:]), abs=1e-9)
    assert fit_rows(own, y, num_images=8, ridge=1e-3, bias=True, open_loop=few)[2] == "closed_loop"


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_taken_where_far_rows_are_the_noisy_ones(bias: bool) -> None:
    x, y = normal(64, 4), normal(64, 4) @ normal(4, 3, seed=1)
    y[:48:6] += 40 * normal(8, 3, seed=2)
    fit, _, name = fit_rows(x, y, num_images=16, ridge=0.5, bias=bias, weighted=True)
    assert name == "row_weights"
    far = (y - y.mean(0)).square().sum(1)
    weights = far.mean() / (far + far.mean())
    weights = weights / weights.mean()
    mean = weights @ x / 64 if bias else 0
    penalty = 0.5 * float((weights[:, None] * (x - mean).square()).sum()) / 4
    reference = Ridge(alpha=penalty, fit_intercept=bias).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    assert torch.allclose(fit.weight, torch.from_numpy(reference.coef_), atol=1e-8)
    if bias:
        assert fit.bias is not None
        assert torch.allclose(fit.bias, torch.from_numpy(reference.intercept_), atol=1e-8)


def test_with_too_few_images_to_hold_some_out_nothing_else_is_taken() -> None:
    x, y, own = planted(3)
    fit, held_out, name = fit_rows(x, y, num_images=3, ridge=1e-3, bias=True, open_loop=own, weighted=True)
    assert (name, held_out) == ("closed_loop", None)
    assert torch.equal(fit.weight, ridge_least_squares(x, y, ridge=1e-3).weight)


def test_the_search_takes_the_open_loop_behind_another_stitch_only() -> None:
    sources = [normed("a", 0), normed("b", 1)]
    other = space_of(sources, IMAGES, settings=SETTINGS)
    other.fits = ("open_loop",)
    found = list(Beam(width=4)(other))
    fits = {(len(path(c)), place): s.fit for c in found for place, s in enumerate(c.recipe.stitches) if s is not None}
    assert {fit for (_, place), fit in fits.items() if place == 0} == {"closed_loop"}
    everything = [s for c in found for s in c.recipe.stitches if s is not None]
    assert {s.fit for s in everything} <= {"closed_loop", "open_loop"}
    plain = {tuple(path(c)): c.recipe.stitches for c in Beam(width=4)(space_of(sources, IMAGES, settings=SETTINGS))}
    for candidate in found:
        before = plain.get(tuple(path(candidate)), ())
        for ours, theirs in zip(candidate.recipe.stitches, before, strict=False):
            assert ours is not None
            assert theirs is not None
            assert ours.r2 is not None
            assert theirs.r2 is not None
            assert ours.r2 >= theirs.r2 - 1e-9


@pytest.mark.parametrize("names", [("batch_norm",), ("open_loop", "row_weights", "batch_norm")])
def test_a_journal_remembers_what_was_changed_and_other_fits_are_another_search(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    def searched(*refinements: str, journal: Path | None = None) -> tuple[list[object], list[str]]:
        pool = Pool([normed("a", 0), normed("b", 1)], (3, 8, 8), settings=SETTINGS)
        with pieces_run(pool) as ran:
            result = pool.search([IMAGES], [IMAGES.flip(3)], refinements=refinements, journal=journal)
        return list(records(result)), ran

    expected, _ = searched(*names)
    first, ran = searched(*names, journal=tmp_path)
    again, nothing = searched(*names, journal=tmp_path)
    assert first == again == expected
    assert ran
    assert nothing == []
    if "open_loop" in names:
        with pytest.raises(JournalError, match="fits"):
            searched("batch_norm", journal=tmp_path)
    else:
        # What comes after composing may be left out, or tried too: it is asked for beside the rest.
        assert searched(journal=tmp_path)[0] == searched()[0]
