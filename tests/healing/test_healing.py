from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from doubles.outcomes import assembled, run_all
from doubles.pools import path, pieces_run, records, references, space_of
from doubles.small_sources import donor, live, shake
from doubles.tensors import digits, distance, noise, seeded
from pytorch_lightning import Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stitch import Beam, CalibrationDataModule, FragmentSearch, StitchedClassifier
from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import StitchError
from lightning_stitch.healing.healer import Healer
from lightning_stitch.healing.healing import heal
from lightning_stitch.healing.layers import layers_of
from lightning_stitch.healing.trials import held_out_images, held_out_r2
from lightning_stitch.maths.regression import r2
from lightning_stitch.recipe import FragmentRef, Recipe
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.candidates import Candidate

IMAGES = 0.7 * digits(32, 12)[0] + 0.3 * noise(32, 3, 12, 12)
SETTINGS = CalibrationSettings(rows_per_image=256, readout="last")
KINDS = ("plain", "separable", "normed")


def source_of(kind: str, seed: int) -> Source:
    """Four blocks of a kind; its cuts are "0" to "2", the last block ends in the features."""
    blocks = []
    for inputs, outputs, stride in ((3, 6, 1), (6, 8, 2), (8, 8, 1), (8, 10, 1)):
        if kind == "plain":
            block = [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        elif kind == "normed":
            block = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        else:
            block = [
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, outputs, 1),
                nn.ReLU(),
            ]
        blocks.append(nn.Sequential(*block))
    pooled = nn.Sequential(*blocks[3], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(*blocks[:3], pooled, nn.Linear(10, 4))
    return live(shake(network, seed), f"{kind}{seed}", size=12)


@cache
def space() -> SearchSpace:
    return space_of([source_of(kind, seed) for seed, kind in enumerate(KINDS)], IMAGES, settings=SETTINGS)


@cache
def every_stitch() -> list[Candidate]:
    """All networks of one stitch that the three sources allow, skips in one of them included."""
    found = []
    for sender, receiver in product(space().sources, repeat=2):
        cuts = len(sender.parts.cuts), len(receiver.parts.cuts)
        for left, entered in product(range(cuts[0]), range(cuts[1])):
            end, start = sender.parts.cuts[left], receiver.parts.cuts[entered]
            if start.format == "vector" or end.format != "vector":
                ends = [FragmentRef(sender.name, None, end.name), FragmentRef(receiver.name, start.name, None)]
                found.append(follow(space(), ends))
    return found


def healer() -> Healer:
    return Healer(space().sources, settings=SETTINGS, ridge=1e-3)


def outputs(candidate: Candidate, where: SearchSpace, images: Tensor = IMAGES) -> Tensor:
    return run_all([candidate], [source.parts for source in where.sources], [images])[0].features


# -- a network -------------------------------------------------------------------------------------------------------


def stitched(where: SearchSpace, *fragments: tuple[str, str | None, str | None]) -> Candidate:
    return follow(where, [FragmentRef(*fragment) for fragment in fragments])


def perturbed(candidate: Candidate, where: SearchSpace, amount: float = 0.1) -> Candidate:
    """The candidate with every matrix behind its first stitch moved at random, and every bias."""
    steps = []
    for step in candidate.steps:
        moved = {}
        pieces = where.sources[step.source].parts.pieces[step.first : step.last] if step.stitch is not None else []
        for piece in pieces:
            for name, layer in layers_of(piece)[0].items():
                for part, x in layer.named_parameters():
                    amplitude = amount * x.detach().std(correction=0)
                    moved[f"{name}.{part}"] = x + amplitude * torch.randn(x.shape, generator=seeded(len(moved)))
        steps.append(dataclasses.replace(step, tensors=moved))
    return dataclasses.replace(candidate, ways=(tuple(steps),))


@pytest.mark.parametrize(
    ("architecture", "count", "size"), [("test_resnet", 16, 64), ("test_efficientnet", 96, 64), ("test_vit", 16, 160)]
)
def test_a_perturbed_network_recovers_its_outputs_where_rows_suffice(architecture: str, count: int, size: int) -> None:
    source = donor(architecture)
    images = 0.5 * digits(count, size)[0] + 0.5 * noise(count, 3, size, size)
    where = space_of([source], images, settings=SETTINGS, ridge=0.0)
    cut = where.sources[0].parts.cuts[-3].name
    exact = stitched(where, (source.name, None, cut), (source.name, cut, None))
    wrong = perturbed(exact, where)
    found = Healer(where.sources, settings=SETTINGS, ridge=0.0).heal(wrong)
    unseen = 0.5 * digits(8, size, first=100)[0] + 0.5 * noise(8, 3, size, size, seed=1)
    own = outputs(references(where)[0], where, unseen)
    before, after = (distance(outputs(candidate, where, unseen), own) for candidate in (wrong, found))
    assert before > 0.03
    assert after < 0.1 * before


def test_of_a_token_network_attention_and_projections_are_healed() -> None:
    source = donor("test_vit")
    images = noise(8, *source.preprocessing.input_size)
    where = space_of([source], images, settings=SETTINGS)
    cut = where.sources[0].parts.cuts[-3].name
    found = heal(stitched(where, (source.name, None, cut), (source.name, cut, None)), where.sources, SETTINGS)
    solved = {name.partition("blocks.")[2] for name in found.steps[1].tensors} | {
        name.partition("blocks.")[2] for name in found.recipe.unhealed
    }
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert any(part in name for name in solved)
    assert set(found.recipe.unhealed.values()) <= {"better as it is"}


@pytest.mark.slow
def test_no_stitch_of_three_sources_explains_less_when_healed_and_most_explain_more() -> None:
    better, skips = 0, 0
    for candidate in every_stitch():
        held_out = held_out_images(candidate, space().sources)[1]
        found = healer().heal(candidate)
        # The same stitch, fitted without the images that judge.
        fair = heal(candidate, space().sources, SETTINGS, only_stitches=True)
        kept = fair if found is candidate else found
        before, after = (held_out_r2(c, space().sources, held_out) for c in (fair, kept))
        assert after >= before
        assert (after > before) == (found is not candidate)
        better += after > before + 0.02
        skips += candidate.steps[0].last < candidate.steps[1].first
    assert len(every_stitch()) > 50
    assert better > 0.4 * len(every_stitch())
    assert skips > 10


def test_a_network_that_healing_would_make_worse_stays_as_it_is() -> None:
    candidates = every_stitch()
    worse = []
    for candidate in candidates:
        held_out = held_out_images(candidate, space().sources)[1]
        fair, tried = (heal(candidate, space().sources, SETTINGS, only_stitches=only) for only in (True, False))
        if held_out_r2(tried, space().sources, held_out) <= held_out_r2(fair, space().sources, held_out):
            worse.append(healer().heal(candidate) is candidate)
    assert worse
    assert all(worse)


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("sender", KINDS)
def test_folded_equals_unfolded(sender: str, share_weights: bool) -> None:
    placements = set()
    first = next(source.name for source in space().sources if source.name.startswith(sender))
    for receiver in space().sources:
        candidate = heal(stitched(space(), (first, None, "0"), (receiver.name, "1", None)), space().sources, SETTINGS)
        recipe = Recipe.from_dict(dataclasses.replace(candidate.recipe, share_weights=share_weights).to_dict())
        network = assembled(candidate, [source.parts for source in space().sources], recipe)
        with torch.no_grad():
            assert torch.allclose(network(IMAGES), outputs(candidate, space()), atol=1e-4)
        placements |= {spec.placement for spec in recipe.stitches if spec is not None}
    assert placements


def test_behind_a_healed_fragment_the_next_stitch_is_fitted_anew_and_explains_more() -> None:
    candidate = stitched(space(), ("plain0", None, "0"), ("normed2", "0", "1"), ("separable1", "1", None))
    bare, found = (heal(candidate, space().sources, SETTINGS, only_stitches=only) for only in (True, False))
    assert path(found) == path(candidate)
    (first, before), (same, after) = bare.recipe.stitches, found.recipe.stitches
    assert same == first
    assert before is not None
    assert after is not None
    assert before.r2 is not None
    assert after.r2 is not None
    assert after.r2 > before.r2
    unset = {"r2": None, "rank": None, "condition": None}
    assert dataclasses.replace(after, **unset) == dataclasses.replace(before, **unset)


def test_no_held_out_image_is_fitted() -> None:
    candidate = stitched(space(), ("plain0", None, "0"), ("normed2", "0", None))
    other = space_of(
        [source.parts.source for source in space().sources],
        torch.cat([IMAGES[:24], IMAGES[24:].flip(0, 2)]),
        settings=SETTINGS,
    )
    for where in (space(), other):
        assert where.sources[0].num_held_out == 8
    bare, same = (heal(candidate, where.sources, SETTINGS, only_stitches=True) for where in (space(), other))
    for one, two in zip(bare.steps[1:], same.steps[1:], strict=True):
        assert one.stitch is not None
        assert two.stitch is not None
        assert torch.equal(one.stitch.state_dict()["weight"], two.stitch.state_dict()["weight"])
        assert not torch.equal(one.stitch.state_dict()["weight"], candidate.steps[1].stitch.state_dict()["weight"])
    assert not bare.recipe.healed


def test_what_was_not_healed_is_described() -> None:
    candidate = heal(stitched(space(), ("plain0", None, "1"), ("plain0", "1", None)), space().sources, SETTINGS)
    recipe = dataclasses.replace(candidate.recipe, unhealed={"plain0: 3.0": "called 2 times"})
    network = assembled(candidate, [source.parts for source in space().sources], Recipe.from_dict(recipe.to_dict()))
    assert "healed behind its stitches" in network.describe()
    assert "not healed (called 2 times): plain0: 3.0" in network.describe()


# -- in a search -----------------------------------------------------------------------------------------------------


def test_finalists_come_from_every_size_class() -> None:
    candidates = [*references(space()), *every_stitch()]
    chosen = healer().finalists(candidates, 10)
    cheapest = min(source.parts.cost.macs for source in space().sources)

    def sizes(among: Sequence[Candidate]) -> set[int]:
        return {sum(c.cost.macs <= share * cheapest for share in (1.0, 0.75, 0.5, 1 / 3)) for c in among}

    assert len(chosen) == len(set(chosen)) == 10
    assert sizes([candidates[index] for index in chosen]) == sizes(every_stitch())
    assert len(sizes(every_stitch())) > 2
    assert {candidates[index].kind for index in chosen} <= {"stitched", "shortened"}


@pytest.mark.parametrize(("share", "healable"), [(0.75, True), (0.5, True), (1 / 3, False)])
def test_a_search_finds_networks_of_every_share_of_the_cheapest_source_and_heals_them(
    share: float, healable: bool
) -> None:
    sources = [source.parts.source for source in space().sources]
    pool = Pool(sources, (3, 12, 12), settings=SETTINGS)
    cheapest = min(source.parts.cost.macs for source in space().sources)
    budget = Budget(max_macs=share * cheapest)
    result = pool.search([IMAGES], [IMAGES.flip(3)], heal=True, budget=budget, max_healed=6)
    healed = [r for r in result.ranked if r.candidate.recipe.healed]
    assert healable <= len(healed) <= 6
    assert {"stitched", "shortened"} & {r.candidate.kind for r in result.ranked}
    assert result.best.candidate.cost.macs <= share * cheapest
    assert result.seconds["heal"] > 0
    for r in healed:
        assert r.candidate.cost.macs <= share * cheapest
        with torch.no_grad():
            assert torch.allclose(pool.assemble(r.candidate)(IMAGES), outputs(r.candidate, space()), atol=1e-4)


def test_a_journal_remembers_healed_networks_and_an_opened_pool_its_groups(tmp_path: Path) -> None:
    sources = [source.parts.source for source in space().sources]
    groups = [index // 5 for index in range(len(IMAGES))]

    def searched(journal: Path | None = None) -> tuple[list[object], list[str]]:
        pool = Pool(sources, (3, 12, 12), settings=SETTINGS)
        with pieces_run(pool) as ran:
            result = pool.search(
                [IMAGES],
                [IMAGES.flip(3)],
                strategy=Beam(width=2),
                heal=True,
                max_healed=8,
                groups=groups,
                journal=journal,
            )
        return list(records(result)), ran

    expected, _ = searched()
    first, _ = searched(tmp_path / "journal")
    again, ran = searched(tmp_path / "journal")
    assert first == again == expected
    assert ran == []
    pool = Pool(sources, (3, 12, 12), settings=SETTINGS)
    pool.calibrate([IMAGES], groups=groups)
    pool.save(tmp_path / "pool")
    opened = Pool.open(tmp_path / "pool", sources)
    assert {source.num_held_out for source in [*opened.calibration.sources, *pool.calibration.sources]} == {7}
    result = opened.search(None, [IMAGES.flip(3)], strategy=Beam(width=2), heal=True, max_healed=8)
    assert list(records(result)) == expected


def test_a_network_that_a_user_names_can_be_healed() -> None:
    pool = Pool([source.parts.source for source in space().sources], (3, 12, 12), settings=SETTINGS)
    pool.calibrate([IMAGES])
    named = [("normed2", None, "0"), ("normed2", "2", None)]
    plain, healed = pool.stitch(named), pool.stitch(named, heal=True)
    own = space().sources[2].features
    assert r2(outputs(healed, space()), own) > r2(outputs(plain, space()), own) + 0.05


def test_a_trainer_installs_a_healed_network(tmp_path: Path) -> None:
    found = load_digits(n_class=3)
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    data = CalibrationDataModule(
        TensorDataset(images, torch.tensor(found.target)),
        image_size=32,
        calibration_samples=16,
        train_samples=90,
        selection_samples=60,
        test_samples=90,
    )
    search = FragmentSearch(
        [{"spec": "test_resnet", "pretrained": False}],
        strategy=Beam(width=2, max_fragments=2),
        budget=Budget(max_macs=2e6),
        exits=False,
        heal=True,
        max_healed=3,
    )
    model, options = StitchedClassifier(num_classes=3), {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=0,
        callbacks=[search],
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data)
    assert search.result is not None
    assert 0 < sum(r.candidate.recipe.healed for r in search.result.ranked) <= 3
    assert model.recipe is not None
    assert model.recipe.with_shares([0.0] * 99) == search.result.best.candidate.recipe.with_shares([0.0] * 99)


def test_deep_stitches_come_beside_the_others_and_leave_half_of_the_network_to_heal() -> None:
    plain, deep = (list(Beam(width=2, max_fragments=2, deep=count)(space())) for count in (0, 2))
    assert [path(c) for c in deep[: len(plain)]] == [path(c) for c in plain]
    assert len(deep) > len(plain)
    for candidate in deep[len(plain) :]:
        last = candidate.steps[1]
        behind = space().sources[last.source].parts.cost_between(last.first, last.last).macs
        assert behind > 0.45 * candidate.cost.macs
    with pytest.raises(StitchError, match="deep must be at least 0; found -1"):
        Beam(deep=-1)
