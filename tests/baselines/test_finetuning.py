from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from doubles.methods import QUIET, three_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch._lightning import pl
from lightning_stitch.baselines.finetuning import Classifier, FineTuning, Trained, quiet_trainers, train_best
from lightning_stitch.errors import StitchError

OPTIONS = {
    **QUIET,
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def linear() -> Classifier:
    model = Classifier(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def trained(model: Classifier, *, rates: tuple[float, ...] = (1e-2,), epochs: int = 4, **options: Any) -> Trained:
    data = three_digits()
    callbacks = options.pop("callbacks", ())
    with quiet_trainers():
        return train_best(
            model,
            data.train_dataloader,
            data.selection_dataloader(),
            FineTuning(**{"epochs": epochs, "flips": "none", **options}),
            learning_rates=rates,
            seed=0,
            trainer_options=OPTIONS,
            callbacks=callbacks,
        )


@torch.no_grad()
def loss_of(model: Classifier) -> float:
    (images, labels) = next(iter(three_digits(batch_size=99).selection_dataloader()))
    return float(functional.cross_entropy(model(images), labels))


class Rates(pl.Callback):
    """Each group's learning rate in each step, and how often the selection images were run."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.validations = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations += 1


def test_the_last_epochs_weights_stay_and_their_loss_is_told() -> None:
    model, seen = linear(), Rates()
    assert trained(model, callbacks=[seen]).loss == pytest.approx(loss_of(model), rel=1e-5)
    assert seen.validations == 1


def test_the_learning_rate_with_the_least_selection_loss_stays_and_each_begins_anew() -> None:
    alone = {rate: trained(linear(), rates=(rate,)).loss for rate in (1e-6, 1e-2, 3.0)}
    model = linear()
    found = trained(model, rates=tuple(alone))
    assert found.learning_rate == min(alone, key=lambda rate: alone[rate]) == 1e-2
    assert found.loss == alone[1e-2] == pytest.approx(loss_of(model), abs=1e-5)


def test_a_rate_at_which_training_diverges_is_not_taken() -> None:
    assert trained(linear(), rates=(1e38, 1e-2)).learning_rate == 1e-2
    with pytest.raises(StitchError, match=r"no finite loss at any learning rate of \[1e\+38\]; lower them"):
        trained(linear(), rates=(1e38,))


def by_hand(model: Classifier, schedule: str, steps: int) -> list[float]:
    """Trains as torch alone does it; the learning rates of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedules = {
        "one-cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    }
    scheduler = schedules[schedule]() if schedule in schedules else None
    loader, rates = three_digits().train_dataloader(), []
    for _ in range(steps // len(loader)):
        for images, labels in loader:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if scheduler is not None and len(rates) < steps:
                scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_training_is_adamw_on_a_schedule_and_repeats_and_leaves_the_random_state_alone(schedule: str) -> None:
    models, state, seen = [linear(), linear()], torch.get_rng_state(), Rates()
    models[1].load_state_dict(models[0].state_dict())
    plain = copy.deepcopy(models[0])
    assert trained(models[0], schedule=schedule, callbacks=[seen]) == trained(models[1], schedule=schedule)
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert torch.equal(torch.get_rng_state(), state)
    rates = by_hand(plain, schedule, steps=8)
    assert [rate for (rate,) in seen.steps] == pytest.approx(rates)
    assert torch.allclose(models[0].head.weight, plain.head.weight, atol=1e-6)


def test_a_new_head_has_a_learning_rate_of_its_own() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    for head_rate, expected in ((1e-1, 1e-1), (None, 1e-3)):
        seen = Rates()
        model = Classifier(network, nn.Linear(5, 3), head_learning_rate=head_rate)
        trained(model, rates=(1e-3,), schedule="constant", callbacks=[seen])
        assert {tuple(step) for step in seen.steps} == {(1e-3, expected)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "FineTuning: epochs must be at least 1; found 0"),
        ({"probe_penalties": (0,)}, r"probe_penalties must be one or more positive numbers; found \[0\]"),
        ({"schedule": "step"}, r"schedule is one of \['one-cycle', 'cosine', 'constant'\]; found 'step'"),
        ({"flips": True}, r"flips is one of \['none', 'horizontal', 'both'\]; found True"),
        ({"learning_rates": ()}, r"learning_rates must be one or more positive numbers; found \[\]"),
        ({"learning_rates": (1e-3, -1.0)}, r"learning_rates must be one or more positive numbers; found"),
        ({"head_learning_rate": 0.0}, "head_learning_rate must be positive; found 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0; found nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StitchError, match=message):
        FineTuning(**options)


@pytest.mark.parametrize("flips", ["none", "horizontal", "both"])
def test_flips_show_each_image_in_all_its_ways_and_nothing_else(flips: Any) -> None:
    seen: list[torch.Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0].clone())

    image = torch.arange(3 * 16 * 16).reshape(3, 16, 16) / 768
    loader = DataLoader(TensorDataset(image.expand(64, -1, -1, -1), torch.arange(64) % 3), batch_size=32)
    with quiet_trainers():
        train_best(
            linear(),
            lambda: loader,
            loader,
            FineTuning(epochs=1, flips=flips),
            learning_rates=(1e-3,),
            seed=0,
            trainer_options=OPTIONS,
            callbacks=[Look()],
        )
    ways = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    ways = ways[: {"none": 1, "horizontal": 2, "both": 4}[flips]]
    counts = [sum(torch.equal(found, way) for found in torch.cat(seen)) for way in ways]
    assert sum(counts) == 64
    assert min(counts) >= 8
