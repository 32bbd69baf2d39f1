"""Fine-tuning as a practitioner does it: AdamW for some epochs, the best epoch by the selection images kept."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_stitch._lightning import NAMESPACE, isolate_rng, pl
from lightning_stitch.errors import StitchError


@dataclass(frozen=True)  # without slots: jsonargparse reads a default's __dict__
class FineTuning:
    """How networks and heads are trained by back-propagation: AdamW, a constant learning rate, cross-entropy.

    After each epoch the loss on the selection images is taken; the weights of the epoch with the least are kept.
    Batches are as large as the data module's.

    Args:
        epochs: Epochs of training through a network, whole or its head alone.
        probe_epochs: Epochs of a linear probe, which trains on features that were computed once.
        learning_rates: Of a whole network. Where there are several, each is tried, and the one with the least loss on
            the selection images is kept; all that are tried count.
        head_learning_rates: Of a head alone, likewise.
        weight_decay: AdamW's.
        flips: Whether training images are flipped at random, horizontally and vertically. A linear probe sees them as
            they are.

    Raises:
        StitchError: If a number is out of range, or there is no learning rate.
    """

    epochs: int = 10
    probe_epochs: int = 100
    learning_rates: Sequence[float] = (1e-4,)
    head_learning_rates: Sequence[float] = (1e-3,)
    weight_decay: float = 0.01
    flips: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("epochs", "probe_epochs"):
            if getattr(self, name) < 1:
                raise StitchError(f"FineTuning: {name} must be at least 1; found {getattr(self, name)}.")
        for name in ("learning_rates", "head_learning_rates"):
            rates = getattr(self, name)
            if not rates or not all(0 < rate < math.inf for rate in rates):
                raise StitchError(f"FineTuning: {name} must be one or more positive numbers; found {list(rates)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise StitchError(f"FineTuning: weight_decay must be at least 0; found {self.weight_decay}.")


@dataclass(frozen=True, slots=True)
class Trained:
    """Least mean cross-entropy on the selection images (nats), its learning rate, epoch (from 1) and weights."""

    loss: float
    learning_rate: float
    epoch: int
    state: dict[str, Tensor]


class Classifier(pl.LightningModule):
    """A network with a head, to be trained where its parameters ask for it.

    Images (batch, channels, height, width) in [0, 1] become features (batch, features), and these logits (batch,
    classes).
    """

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.optimizer: Callable[..., Optimizer] = AdamW

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        logits: Tensor = self.head(self.network(images))
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """The loss by which the best epoch is chosen."""
        images, labels = batch
        self.log("val_loss", functional.cross_entropy(self(images), labels), batch_size=len(labels))

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over all parameters that are to be trained."""
        return self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])


class Flips(pl.Callback):
    """Flips each training image with probability one half horizontally, and likewise vertically."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Flip the images of the batch in place."""
        images = batch[0]
        for axis in (-1, -2):
            chosen = torch.rand(len(images), device=images.device) < 0.5
            images[chosen] = images[chosen].flip(axis)


@contextmanager
def quiet_trainers() -> Iterator[None]:
    """Without what each of many Trainers says of devices and epochs, and its advice on what is done on purpose."""
    logger = logging.getLogger(f"{NAMESPACE}.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    advice = ("Found .* in eval mode at the start", "The '.*_dataloader' does not have many workers")
    try:
        with warnings.catch_warnings():
            for words in advice:
                warnings.filterwarnings("ignore", words)
            # What torch tells Lightning's developers.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def train_best(
    model: Any,
    train: Callable[[], DataLoader],
    selection: DataLoader,
    settings: FineTuning,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    seed: int,
    trainer_options: dict[str, Any],
    callbacks: Sequence[pl.Callback] = (),
) -> Trained:
    """Train a model from where it stands, once with each learning rate, and leave it with the best weights.

    Args:
        model: A LightningModule that logs "val_loss" and makes its optimizer by an attribute `optimizer`.
        train: Gives the loader of training batches, the same each time.
        selection: Batches that choose epoch and learning rate.
        settings: The recipe.
        learning_rates: Those to try.
        epochs: Most epochs.
        seed: Of what is random in training; the global random state is restored.
        trainer_options: Arguments of the Trainer.
        callbacks: More callbacks.
    """
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trials = []
    for learning_rate in learning_rates:
        model.load_state_dict(start)
        model.optimizer = partial(AdamW, lr=learning_rate, weight_decay=settings.weight_decay)
        with tempfile.TemporaryDirectory() as folder, isolate_rng():
            torch.manual_seed(seed)
            keeper = pl.callbacks.ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_weights_only=True)
            pl.Trainer(max_epochs=epochs, callbacks=[keeper, *callbacks], **trainer_options).fit(
                model, train(), selection
            )
            saved = torch.load(keeper.best_model_path, map_location=model.device, weights_only=True)
        loss = keeper.best_model_score
        assert loss is not None
        trials.append(Trained(float(loss), learning_rate, int(saved["epoch"]) + 1, saved["state_dict"]))
    best = min(trials, key=lambda trained: trained.loss)
    model.load_state_dict(best.state)
    return best
