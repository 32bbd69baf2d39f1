"""Fine-tuning as a practitioner does it: AdamW, one cycle of the learning rate, which the selection images choose."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from lightning_stitch._lightning import NAMESPACE, isolate_rng, pl
from lightning_stitch.errors import StitchError

Schedule = Literal["one-cycle", "cosine", "constant"]
Flip = Literal["none", "horizontal", "both"]


@dataclass(frozen=True)  # without slots: jsonargparse reads a default's __dict__
class FineTuning:
    """How networks and heads are trained by back-propagation: AdamW, cross-entropy, a schedule, flips.

    The weights at the end of the last epoch are kept. Statistics of BatchNorm stay, and what drops units or blocks out
    does not. Batches are as large as the data module's.

    Args:
        epochs: Epochs of training through a network, whole or its head alone.
        learning_rates: Of a network, the highest of the schedule. Each is tried, the one with the least loss on the
            selection images is kept; all that are tried count.
        head_learning_rate: Of a head that is new. One that was solved for is trained at the network's rate.
        schedule: "one-cycle": up in three tenths of the steps and down to nothing (Smith and Topin 2018,
            "Super-convergence"); "cosine": down to nothing; "constant".
        weight_decay: AdamW's.
        flips: Which ways training images are flipped at random. A linear probe sees them as they are.
        probe_penalties: L2 penalties of a linear probe (`fit_logistic`), of which the selection images choose; all
            count.

    Raises:
        StitchError: If a number is out of range, there is none to try, or there is no such schedule or way to flip.
    """

    epochs: int = 15
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3)
    head_learning_rate: float = 1e-2
    schedule: Schedule = "one-cycle"
    weight_decay: float = 0.01
    flips: Flip = "horizontal"
    probe_penalties: Sequence[float] = (1.0, 10.0, 100.0)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.epochs < 1:
            raise StitchError(f"FineTuning: epochs must be at least 1; found {self.epochs}.")
        for name in ("learning_rates", "probe_penalties"):
            numbers = getattr(self, name)
            if not numbers or not all(0 < number < math.inf for number in numbers):
                raise StitchError(f"FineTuning: {name} must be one or more positive numbers; found {list(numbers)}.")
        if not 0 < self.head_learning_rate < math.inf:
            raise StitchError(f"FineTuning: head_learning_rate must be positive; found {self.head_learning_rate}.")
        if not 0 <= self.weight_decay < math.inf:
            raise StitchError(f"FineTuning: weight_decay must be at least 0; found {self.weight_decay}.")
        for name, known in (("schedule", get_args(Schedule)), ("flips", get_args(Flip))):
            if getattr(self, name) not in known:
                raise StitchError(f"FineTuning: {name} is one of {list(known)}; found {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class Trained:
    """Mean cross-entropy on the selection images (nats), and the learning rate that led to it."""

    loss: float
    learning_rate: float


class Classifier(pl.LightningModule):
    """A network with a head, to be trained where its parameters ask for it.

    Images (batch, channels, height, width) in [0, 1] become features (batch, features), and these logits (batch,
    classes). `head_learning_rate` None: the head's is the network's.
    """

    def __init__(self, network: nn.Module, head: nn.Module, *, head_learning_rate: float | None = None) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.head_learning_rate = head_learning_rate
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
        """The loss by which the learning rate is chosen."""
        images, labels = batch
        self.log("val_loss", functional.cross_entropy(self(images), labels), batch_size=len(labels))

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over all parameters that are to be trained."""
        rate = {} if self.head_learning_rate is None else {"lr": self.head_learning_rate}
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in self.network.parameters() if parameter.requires_grad]},
            {"params": list(self.head.parameters()), **rate},
        ]
        return self.optimizer([group for group in groups if group["params"]])


class Scheduled(pl.Callback):
    """Steps a schedule of learning rates, whose highest are those of the optimizer's groups, after each batch."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._scheduler: LRScheduler | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the schedule, which ends with the last batch."""
        (optimizer,) = trainer.optimizers
        steps = int(trainer.estimated_stepping_batches)
        if self.schedule == "one-cycle":
            self._scheduler = OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
        elif self.schedule == "cosine":
            self._scheduler = CosineAnnealingLR(optimizer, steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The next batch's learning rate."""
        if self._scheduler is not None and trainer.global_step < trainer.estimated_stepping_batches:
            self._scheduler.step()


class Flips(pl.Callback):
    """Flips each training image with probability one half horizontally, and if both ways likewise vertically."""

    def __init__(self, flips: Flip) -> None:
        self.axes = {"none": (), "horizontal": (-1,), "both": (-1, -2)}[flips]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Flip the images of the batch in place."""
        images = batch[0]
        for axis in self.axes:
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
    seed: int,
    trainer_options: dict[str, Any],
    callbacks: Sequence[pl.Callback] = (),
) -> Trained:
    """Train a model from where it stands, once with each learning rate, and leave it with the best one's weights.

    Args:
        model: A LightningModule that logs "val_loss" and makes its optimizer by an attribute `optimizer`.
        train: Gives the loader of training batches, the same each time.
        selection: Batches that choose the learning rate.
        settings: The recipe.
        learning_rates: Those to try.
        seed: Of what is random in training; the global random state is restored.
        trainer_options: Arguments of the Trainer.
        callbacks: More callbacks.

    Raises:
        StitchError: If the loss is finite at none of the learning rates.
    """
    start = _copy(model)
    best, best_state = Trained(math.inf, math.nan), start
    for learning_rate in learning_rates:
        model.load_state_dict(start)
        model.optimizer = partial(AdamW, lr=learning_rate, weight_decay=settings.weight_decay)
        with isolate_rng():
            torch.manual_seed(seed)
            trainer = pl.Trainer(
                max_epochs=settings.epochs,
                check_val_every_n_epoch=settings.epochs,
                callbacks=[Scheduled(settings.schedule), Flips(settings.flips), *callbacks],
                enable_checkpointing=False,
                **trainer_options,
            )
            trainer.fit(model, train(), selection)
        trained = Trained(float(trainer.callback_metrics["val_loss"]), learning_rate)
        if trained.loss < best.loss:
            best, best_state = trained, _copy(model)
    if best.loss == math.inf:
        raise StitchError(
            f"Training came to no finite loss at any learning rate of {list(learning_rates)}; lower them."
        )
    model.load_state_dict(best_state)
    return best


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
