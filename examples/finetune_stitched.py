"""The script finetune.py, with a network stitched from three ImageNet networks in the place of one of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import lightning_stitch as ls

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class SolarCells(pl.LightningDataModule):
    """The images that prepare_solar_cells.py writes, normalised."""

    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.size, self.labels = size, labels

    def setup(self, stage: str) -> None:
        """Split at random: as many as there are labels, 256 and 512."""
        steps = [transforms.Resize(self.size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        cells = ImageFolder("solar_cells/images", transforms.Compose(steps))
        order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0)).tolist()
        self.test, self.val = Subset(cells, order[:512]), Subset(cells, order[512:768])
        self.train = Subset(cells, order[768 : 768 + self.labels])

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.val, batch_size=32)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.test, batch_size=32)


class Classifier(pl.LightningModule):
    """A backbone and a linear layer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = ls.StitchedBackbone(num_features=1280)
        self.head = nn.Linear(self.backbone.num_features, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.backbone(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's side (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=512, help="labelled images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    options = parser.parse_args(argv)
    pl.seed_everything(0)
    data = ls.CalibrationDataModule(datamodule=SolarCells(options.size, options.labels), mean=MEAN, std=STD)
    model = Classifier(options.lr)
    best = pl.callbacks.ModelCheckpoint(monitor="val_accuracy", mode="max")
    sources = [f"local-dir:solar_cells/efficientnet_lite{size}" for size in range(3)]
    search = ls.FragmentSearch(sources, attribute="backbone", head_attribute="head")
    trainer = pl.Trainer(max_epochs=options.epochs, logger=False, callbacks=[search, best])
    trainer.fit(model, data)
    trainer.test(model, data, ckpt_path="best")


if __name__ == "__main__":
    main()
