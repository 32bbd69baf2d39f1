"""LightningModules as users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_stitch import StitchedBackbone
from lightning_stitch._lightning import pl


class Classifier(pl.LightningModule):
    """An ordinary module that knows nothing of stitching."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.build()

    def build(self) -> None:
        self.backbone: nn.Module = StitchedBackbone(num_features=40)
        self.head: nn.Module = nn.Linear(40, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
