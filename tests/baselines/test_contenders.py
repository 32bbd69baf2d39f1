from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.methods import bright_halves, half_blind, search_of, spec_of, three_digits
from doubles.small_sources import plain
from torch import Tensor, nn

from lightning_stitch import CalibrationDataModule, FineTuning, FragmentSearch, fit_ridge_head, load_sources
from lightning_stitch.baselines.contenders import METHODS, SEARCHED, Contender, Contenders, Method
from lightning_stitch.baselines.finetuning import quiet_trainers
from lightning_stitch.cutting.probing import network_cost

SHAPE = (3, 16, 16)


def contenders(folder: Path, search: FragmentSearch | None = None, data: Any = None, **recipe: Any) -> Contenders:
    search = search or search_of()
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    return Contenders(
        search,
        load_sources(search.sources),
        data or three_digits(),
        FineTuning(**{"epochs": 2, "learning_rates": (1e-4,), **recipe}),
        seed=0,
        trainer_options=options,
        device=torch.device("cpu"),
    )


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with quiet_trainers():
        yield


def macs(made: Any) -> tuple[int, int, int]:
    """Of a classifier, of its first layer and of its head."""
    whole = network_cost(nn.Sequential(made.network, made.head), SHAPE).macs
    first = next(module for module in made.network.modules() if isinstance(module, nn.Conv2d))
    return whole, network_cost(first, SHAPE).macs, network_cost(made.head, (made.head.weight.shape[1],)).macs


def passes_of(pile: Contenders, made: Contender) -> int:
    """FLOPs of 40 train and 20 selection images through all sources, of 12 calibration images through the chosen."""
    assert made.source is not None
    return 2 * 60 * sum(part.cost.macs for part in pile.parts) + 2 * 12 * pile.parts[made.source].cost.macs


def test_heads_on_a_source_are_fitted_on_all_labelled_images_once_it_is_chosen(tmp_path: Path) -> None:
    pile = contenders(tmp_path)
    made = pile.make("closed-form head")
    batches = list(pile.data.labelled_dataloader("train", "selection", "calibration"))
    images, labels = (torch.cat(x) for x in zip(*batches, strict=True))
    assert len(images) == 72
    with torch.no_grad():
        head, _ = fit_ridge_head(made.network(images), labels, num_classes=3)
        torch.testing.assert_close(made.head(made.network(images)), head(made.network(images)), rtol=1e-4, atol=1e-4)
        chosen_by = pile._closed_form.head(made.network(images))
    assert not torch.allclose(chosen_by, made.head(made.network(images)), atol=1e-3)


def test_a_closed_form_head_takes_one_pass_of_every_source_and_the_solves(tmp_path: Path) -> None:
    pile = contenders(tmp_path)
    made = pile.make("closed-form head")
    passes = passes_of(pile, made)
    # 40 rows of 10 and of 12 features: each fit has an eigendecomposition.
    solves = sum(9 * width**3 for width in (10, 12))
    assert passes + solves < made.spent.flops < 1.05 * passes


@pytest.mark.parametrize("method", ["full fine-tuning", "closed-form head, fine-tuned"])
def test_training_a_network_counts_both_ways_and_the_pass_that_chooses_the_learning_rate(
    tmp_path: Path, method: Method
) -> None:
    pile = contenders(tmp_path)
    choice, made = pile._closed_form, pile.make(method)
    whole, first, _ = macs(made)
    epoch = 40 * 2 * (3 * whole - first)
    assert made.spent.flops - choice.spent.flops == 2 * epoch + 20 * 2 * whole
    assert made.spent.seconds > choice.spent.seconds


def test_training_a_head_through_the_network_counts_no_way_back_through_it(tmp_path: Path) -> None:
    pile = contenders(tmp_path)
    choice, made = pile._closed_form, pile.make("head-only fine-tuning")
    whole, _, head = macs(made)
    assert made.spent.flops - choice.spent.flops == 2 * 40 * 2 * (whole + head) + 20 * 2 * whole


def test_a_linear_probe_counts_one_pass_of_every_source_and_all_its_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pile = contenders(tmp_path, probe_penalties=(1.0, 100.0))
    losses: list[tuple[int, bool]] = []
    cross_entropy = nn.functional.cross_entropy

    def counted(logits: Tensor, labels: Tensor) -> Tensor:
        losses.append((len(labels), logits.requires_grad))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(nn.functional, "cross_entropy", counted)
    made = pile.make("linear probe")
    assert sum(not trains for _, trains in losses) == 2 * 2  # sources, penalties
    narrow, wide = 10 * 3, 12 * 3  # weights of a head on either source
    products = sum(rows * (4 if trains else 2) for rows, trains in losses)  # forward, and back to the weights
    passes = passes_of(pile, made)
    # What the line searches and the memory of L-BFGS take of dot products is on top.
    assert narrow * products < made.spent.flops - passes < 2 * wide * products


def test_each_learning_rate_that_is_tried_counts(tmp_path: Path) -> None:
    spent = []
    for rates in ((1e-3,), (1e-3, 1e-2)):
        pile = contenders(tmp_path, learning_rates=rates)
        spent.append(pile.make("full fine-tuning").spent.flops - pile._closed_form.spent.flops)
    assert spent[1] == 2 * spent[0]


def test_a_stitchnet_counts_its_search_and_fine_tuning_it_counts_both(tmp_path: Path) -> None:
    pile = contenders(tmp_path)
    stitched = pile.make("StitchNet")
    passes = sum(part.cost.macs for part in pile.parts)
    # Calibration runs both sources over 12 images, ranking over 20; the head's images run through the network alone.
    assert stitched.spent.flops > 2 * (12 + 20) * passes + 2 * 40 * macs(stitched)[0]
    tuned = pile.make("StitchNet, fine-tuned")
    whole, first, _ = macs(tuned)
    assert tuned.spent.flops - stitched.spent.flops == 2 * 40 * 2 * (3 * whole - first) + 20 * 2 * whole
    assert tuned.name == stitched.name


def halves() -> CalibrationDataModule:
    """Those that choose tell by the left half alone, test images by the right one, train images most by that."""
    train = bright_halves(120, left=0.2, right=0.5, seed=0)
    return CalibrationDataModule(
        train,
        bright_halves(40, left=0.5, right=0.0, seed=1),
        bright_halves(80, left=0.0, right=0.5, seed=2),
        calibration_samples=12,
    )


@pytest.mark.parametrize("method", METHODS[:5])
@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_the_source_is_the_best_on_selection_images_and_not_the_best_on_test_images(
    tmp_path: Path, method: Method, order: tuple[str, str]
) -> None:
    search = FragmentSearch([half_blind(side) for side in order])
    pile = contenders(tmp_path, search, halves(), epochs=1)
    assert pile.make(method).name == "left"
    test, targets = next(iter(halves().test_dataloader()))
    right = {}
    for side in order:
        made = contenders(tmp_path, FragmentSearch([half_blind(side)]), halves()).make("closed-form head")
        right[side] = (made.head(made.network(test)).argmax(1) == targets).double().mean().item()
    assert right["right"] > right["left"] + 0.1


def test_the_closed_form_head_is_that_of_the_sources_own_features(tmp_path: Path) -> None:
    pile = contenders(tmp_path)
    made = pile.make("closed-form head")
    data = three_digits(batch_size=99)
    (train, labels), (selection, answers) = (
        next(iter(loader)) for loader in (data.head_dataloader(), data.selection_dataloader())
    )
    losses = {}
    for source in (plain("a", (6, 8, 10), seed=0, classes=3), plain("b", (4, 12, 12), seed=1, classes=3)):
        body = nn.Sequential(pile.parts[0].preprocess, *list(source.module)[:-1])
        with torch.no_grad():
            head, _ = fit_ridge_head(body(train), labels, num_classes=3)
            losses[source.name] = nn.functional.cross_entropy(head(body(selection)), answers).item()
    assert made.name == min(losses, key=lambda name: losses[name])
    assert made.selection_loss == pytest.approx(losses[made.name], rel=1e-4)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.mark.parametrize(
    ("method", "weights_move"),
    [("head-only fine-tuning", False), ("full fine-tuning", True), ("closed-form head, fine-tuned", True)],
)
def test_what_is_trained_moves_and_what_is_frozen_does_not(tmp_path: Path, method: Method, weights_move: bool) -> None:
    torch.manual_seed(0)
    source = {**spec_of(plain("a", (6, 8, 10), seed=0)), "spec": Normed(), "name": "normed"}
    pile = contenders(tmp_path, FragmentSearch([source]))
    before = pile.make("closed-form head").network.state_dict()
    after = pile.make(method).network.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("weight") for name in moved) is weights_move
    assert not any("running" in name for name in moved)


def test_the_stitchnet_is_one_also_where_the_search_ranks_a_source_first(tmp_path: Path) -> None:
    def by_macs(candidates: Any, _: Any) -> list[dict[str, float]]:
        return [{"score": {"source": 2.0}.get(c.kind, 1.0 + c.cost.macs / 1e9)} for c in candidates]

    search = search_of()
    search.search_settings = replace(search.search_settings, ranking=by_macs)
    made = contenders(tmp_path, search).make("StitchNet")
    assert made.search_choice is not None
    assert made.search_choice.startswith("source: ")
    assert " | " in made.name
    assert len(made.network.recipe.stitches) > 0  # type: ignore[arg-type]


def test_where_there_is_no_stitchnet_the_searchs_own_choice_stands(tmp_path: Path) -> None:
    search = search_of(exits=False)
    search.search_settings = replace(search.search_settings, max_candidates=0)
    made = contenders(tmp_path, search).make("StitchNet")
    assert made.search_choice is not None
    assert made.search_choice.split(": ", 1)[1] == made.name


@pytest.mark.parametrize("first", ["source", "early exit", "stitched"])
def test_each_kind_of_a_search_is_a_method_of_its_own_whatever_the_search_takes(tmp_path: Path, first: str) -> None:
    search = search_of()
    ranking = lambda candidates, _: [{"score": float(c.kind == first)} for c in candidates]  # noqa: E731
    search.search_settings = replace(search.search_settings, ranking=ranking)
    pile = contenders(tmp_path, search)
    recipes = {}
    for method in ("all depths", "early exit", "StitchNet"):
        made = pile.make(method)
        assert made is not None
        recipes[method] = made.network.recipe
        with torch.no_grad():
            assert made.head(made.network(torch.rand(2, 3, 16, 16))).shape == (2, 3)
    assert recipes["all depths"].scores["macs"] > recipes["early exit"].scores["macs"]
    assert len({run.ref.source for run in recipes["early exit"].runs}) == 1
    assert not recipes["early exit"].stitches
    assert recipes["StitchNet"].stitches


def test_methods_without_back_propagation_never_call_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("back-propagation")

    pile = contenders(tmp_path)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    for method in METHODS:
        if method == "closed-form head" or method in SEARCHED - {"StitchNet, fine-tuned"}:
            made = pile.make(method)
            assert (made is None) is (method == "smaller image")
            assert made is None or made.learning_rate is None
        else:
            with pytest.raises(AssertionError, match="back-propagation"):
                pile.make(method)


def test_the_search_is_run_as_a_copy_without_table_and_journal(tmp_path: Path) -> None:
    search = search_of(compare=True, journal=tmp_path / "journal")
    pile = contenders(tmp_path, search)
    pile.make("StitchNet")
    assert search.result is None
    assert search.compare
    assert not (tmp_path / "journal").exists()
    assert not (tmp_path / "comparison.csv").exists()
    assert (tmp_path / "candidates.csv").exists()
