"""Join the front of a convolutional network to the tail of a vision transformer, at every pair of their cuts.

    pip install lightning-stitch[test] && python examples/cnn_to_vit.py

Both are trained first, with Lightning, on one half of scikit-learn's handwritten digits (real scans, 8 x 8 pixels, here
resized to 32 x 32); that takes a minute on two cores. Then, without any training: each front of the CNN is stitched to
each tail of the ViT on 64 unlabelled images, every network gets the same closed-form head on 256 labelled images, 128
more rank them, and the rest test the best. Nothing here knows what a CNN or a ViT is: a stitch turns maps into tokens
because the two cuts say that they are maps and tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_stitch as ls
from lightning_stitch.report import print_comparison, write_comparison
from lightning_stitch.report.comparison import compare
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.sources.views import Preprocess
from lightning_stitch.stitching.candidates import Candidate

SIZE = 32
PREPROCESSING = ls.Preprocessing((3, SIZE, SIZE), mean=(0.3,) * 3, std=(0.35,) * 3, fixed_size=True)


class Classifier(pl.LightningModule):
    """An ordinary network, trained in the ordinary way."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.normalise = Preprocess(PREPROCESSING)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(self.normalise(images)), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with one cycle of learning rates."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images as (3, 32, 32) in [0, 1], shuffled, and their labels."""
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].contiguous(), torch.tensor(found.target)[order]


def trained(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int) -> nn.Module:
    """The network after some epochs of training."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Classifier(network), loader)
    return network.eval()


def every_joint(space: SearchSpace) -> Iterator[Candidate]:
    """A search strategy of its own: each front of the first source with each tail of the second."""
    front, tail = space.sources
    for leave in front.parts.cuts:
        for enter in tail.parts.cuts:
            path = [ls.FragmentRef(front.name, None, leave.name), ls.FragmentRef(tail.name, enter.name, None)]
            yield follow(space, path)


def joints_table(result: ls.SearchResult) -> Table:
    """How good each joint is on the selection images, and how it scored before anything ran behind it."""
    table = Table(title="CNN fronts stitched to ViT tails, best first by the selection images", title_justify="left")
    for column in ("CNN up to", "ViT from", "stitch", "CKA", "held-out R2", "M params", "M MACs", "LOO accuracy"):
        table.add_column(column, justify="left" if column in ("CNN up to", "ViT from", "stitch") else "right")
    for ranked in result.ranked:
        recipe, cost = ranked.candidate.recipe, ranked.candidate.cost
        if ranked.candidate.kind == "stitched":
            spec = recipe.stitches[0]
            table.add_row(
                recipe.runs[0].ref.end,
                recipe.runs[1].ref.start,
                f"{spec.in_format} {spec.in_channels} -> {spec.out_format} {spec.out_channels}, {spec.placement}",
                f"{spec.cka:.3f}",
                f"{spec.r2:.3f}",
                f"{cost.params / 1e6:.3f}",
                f"{cost.macs / 1e6:.2f}",
                f"{ranked.scores['loo_accuracy']:.3f}",
            )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Train the two sources, join them everywhere, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="of training the two sources")
    parser.add_argument("--output", type=Path, default=Path("cnn_to_vit"), help="folder for comparison.csv and .json")
    options = parser.parse_args(arguments)

    pl.seed_everything(0)
    images, labels = digits()
    parts = dict(zip(("networks", "calibration", "head", "selection", "test"), (900, 64, 256, 128, 449), strict=True))
    x, y = (dict(zip(parts, part.split(list(parts.values())), strict=True)) for part in (images, labels))

    cnn = timm.create_model("test_resnet", num_classes=10)
    vit = timm.create_model("test_vit", num_classes=10, img_size=SIZE, patch_size=4, depth=4)
    sources = [
        ls.load_source(
            trained(network, x["networks"], y["networks"], epochs=options.epochs),
            name=name,
            preprocessing=PREPROCESSING,
        )
        for name, network in (("cnn", cnn), ("vit", vit))
    ]

    pool = ls.Pool(sources, (3, SIZE, SIZE))
    result = pool.search(
        [x["calibration"]],
        [(x["selection"], y["selection"])],
        strategy=every_joint,
        num_classes=10,
        exits=False,
    )
    head, test = [(x["head"], y["head"])], [(x["test"], y["test"])]
    comparison = compare(pool, result, head, test, num_classes=10, fractions=())
    console = Console(width=130)
    console.print(joints_table(result))
    title = "Test images: the sources, each stitched to itself, and the best CNN -> ViT"
    print_comparison(comparison.rows, comparison.words, title=title, console=console)
    print(pool.assemble(result.best_stitched.candidate).describe())
    written = write_comparison(comparison.rows, comparison.words, options.output)
    print(f"The table is in {written[0]} and {written[1]}.")


if __name__ == "__main__":
    main()
