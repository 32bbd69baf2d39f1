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
from lightning_stitch.baselines.finetuning import Classifier, FineTuning, Flips, Trained, quiet_trainers, train_best
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
            FineTuning(**options),
            learning_rates=rates,
            epochs=epochs,
            seed=0,
            trainer_options=OPTIONS,
            callbacks=callbacks,
        )


@torch.no_grad()
def loss_of(model: Classifier) -> float:
    (images, labels) = next(iter(three_digits(batch_size=99).selection_dataloader()))
    return float(functional.cross_entropy(model(images), labels))


class Epochs(pl.Callback):
    """The loss after each epoch, over all trainings."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.parametrize("rate", [1e-2, 3.0])
def test_the_weights_of_the_epoch_with_the_least_selection_loss_stay(rate: float) -> None:
    model, epochs = linear(), Epochs()
    found = trained(model, rates=(rate,), callbacks=[epochs])
    assert len(epochs.losses) == 4
    assert found.loss == pytest.approx(min(epochs.losses))
    assert epochs.losses[found.epoch - 1] == min(epochs.losses)
    assert loss_of(model) == pytest.approx(found.loss, rel=1e-5)


def test_the_learning_rate_with_the_least_selection_loss_stays_and_each_begins_anew() -> None:
    alone = {rate: trained(linear(), rates=(rate,)).loss for rate in (1e-6, 1e-2, 3.0)}
    model = linear()
    found = trained(model, rates=tuple(alone))
    assert found.learning_rate == min(alone, key=lambda rate: alone[rate]) == 1e-2
    assert found.loss == alone[1e-2] == pytest.approx(loss_of(model), abs=1e-5)


def test_training_is_adamw_and_repeats_and_leaves_the_random_state_alone() -> None:
    models, state = [linear(), linear()], torch.get_rng_state()
    models[1].load_state_dict(models[0].state_dict())
    by_hand = copy.deepcopy(models[0])
    assert trained(models[0], epochs=1).loss == trained(models[1], epochs=1).loss
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert torch.equal(torch.get_rng_state(), state)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.01)
    for images, labels in three_digits().train_dataloader():
        optimizer.zero_grad()
        functional.cross_entropy(by_hand(images), labels).backward()
        optimizer.step()
    assert torch.allclose(models[0].head.weight, by_hand.head.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "FineTuning: epochs must be at least 1; found 0"),
        ({"probe_epochs": -1}, "probe_epochs must be at least 1; found -1"),
        ({"learning_rates": ()}, r"learning_rates must be one or more positive numbers; found \[\]"),
        ({"head_learning_rates": (1e-3, -1.0)}, r"head_learning_rates must be one or more positive numbers; found"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0; found nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StitchError, match=message):
        FineTuning(**options)


def test_flips_show_each_image_in_all_four_ways_and_nothing_else() -> None:
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
            FineTuning(),
            learning_rates=(1e-3,),
            epochs=1,
            seed=0,
            trainer_options=OPTIONS,
            callbacks=[Flips(), Look()],
        )
    ways = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    counts = [sum(torch.equal(found, way) for found in torch.cat(seen)) for way in ways]
    assert sum(counts) == 64
    assert min(counts) >= 8
