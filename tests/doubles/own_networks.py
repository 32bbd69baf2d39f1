"""Networks as users write them, one kind of difficulty in each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from doubles.small_sources import shake
from doubles.tensors import noise
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

SIZE = (3, 16, 16)


class Own(nn.Module):
    """Layers of which each network below makes what it will."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 2, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(6, 4)
        shake(self, 0)

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.relu(self.norm(self.b(self.relu(self.a(x))))))

    def tail(self, x: Tensor) -> Tensor:
        return self.head(self.c(x).mean((2, 3)))


class Optional(Own):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_features: bool = False) -> Tensor:
        x = self.relu(self.a(x))
        x = self.b(x if mask is None else x * mask)
        return x if return_features else self.tail(x)


class AnyInputs(Own):
    def forward(self, *inputs: Tensor, **options: bool) -> Tensor:
        return self.tail(self.b(self.a(inputs[0]) * (2 if options.get("twice") else 1)))


class CalledTwice(Own):
    """One layer twice: with cuts between the calls, and inside one residual block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.relu(self.b(self.a(x)))))
        return self.tail(x + self.b(torch.tanh(self.b(x))))


class Tied(Own):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(4, 4, 3, padding=1)
        self.d.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.d(self.relu(self.b(self.a(x)))) * self.b.weight.mean())


class AddsInPlace(Own):
    """`x += y` changes what other names of x see, and numbers are not tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        shortcut, height = x, x.shape[2]
        x += self.b(torch.tanh(x))
        width = height
        height //= 2
        x = self.b(x.view(-1, 4, 2 * height, width)) * shortcut
        x -= x.mean()
        x /= 2
        return self.tail(x)


class WritesItems(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, 0] = 0
        x = self.b(x)
        x[..., 1:] *= 3
        first = x[:, :1]
        first += 1
        return self.tail(self.relu(x))


class WritesItsInput(Own):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x[:, :, 0] = 1
        return super().forward(x)


class LooksAtSizesAndWrites(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        same = x
        x += 1 if x.shape[2] > 2 else 2
        x[:, x.shape[1] // 2] = 0
        return self.tail(self.b(x) * same)


class Checkpointed(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.b, self.relu(self.a(x)), use_reentrant=False)
        return self.tail(self.norm(x))


class Module(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.head, self.loss = Own(), nn.Linear(width, 3), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained() -> Module:
    """As it comes out of a Trainer, which it still refers to."""
    module = Module()
    batches = DataLoader(TensorDataset(noise(4, *SIZE), torch.arange(4) % 3), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **quiet)
    trainer.fit(module, batches)
    return module


def reparametrised() -> nn.Module:
    network = Own()
    parametrizations.weight_norm(network.b)
    parametrizations.spectral_norm(network.c)
    return network.eval()


def older_weight_norm() -> nn.Module:
    """Its weight is a plain attribute with a history of gradients, and a hook computes it anew."""
    network = Own()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(network.b)
        nn.utils.weight_norm(network.c)
    network(noise(1, *SIZE))
    return network.eval()


class Caches(Own):
    """Keeps what it has computed, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        if "scale" not in self.kept:
            self.kept["scale"] = self.norm.weight.view(-1, 1, 1) * 2
        return self.tail(self.b(x * self.kept["scale"]))


def that_has_run() -> nn.Module:
    network = Caches()
    network(noise(1, *SIZE))
    return network.eval()


def hooked() -> nn.Module:
    network = Module()
    network.backbone.b.register_forward_hook(lambda module, inputs, output: output * 2)
    network.backbone.c.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    network.backbone.register_forward_hook(lambda module, inputs, output: output.abs())
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Own,
    "LightningModule": Module,
    "LightningModule after fit": trained,
    "backbone of a LightningModule": lambda: Module().backbone,
    "optional inputs": Optional,
    "any inputs": AnyInputs,
    "a layer called twice": CalledTwice,
    "tied weights": Tied,
    "+=": AddsInPlace,
    "[] =": WritesItems,
    "input written": WritesItsInput,
    "sizes and []=": LooksAtSizesAndWrites,
    "activation checkpoints": Checkpointed,
    "parametrised weights": reparametrised,
    "older weight norm": older_weight_norm,
    "a cache, filled": that_has_run,
    "hooks": hooked,
    "torch.fx": lambda: fx.symbolic_trace(Own()),
}
