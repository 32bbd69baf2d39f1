"""Makes the files that test_saved.py reads: what a user keeps, as this commit writes it, of two tiny networks.

    python tests/regression/make.py

Nothing was released yet, so whoever changes a format makes the files again, in the commit that changes it. From the
first release on they stay, and later ones go beside them.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from lightning_stitch import (
    Beam,
    CalibrationSettings,
    Pool,
    SearchResult,
    Source,
    StitchedClassifier,
    fit_head,
    load_source,
)

SAVED = Path(__file__).parent / "saved"
NAMES = ["red", "green", "blue"]
SHAPE = (3, 8, 8)
TINY = {"img_size": 8, "patch_size": 4, "num_heads": 1, "mlp_ratio": 1.0, "num_classes": 0, "global_pool": "avg"}
FEW_TENSORS = {"qkv_bias": False, "proj_bias": False, "init_values": None, "class_token": False}


def tiny_sources() -> list[Source]:
    """Two vision transformers of a few thousand weights, the same wherever and whenever they are made."""
    sources = []
    for name, width, depth in (("short", 4, 1), ("long", 3, 2)):
        arguments = {**TINY, **FEW_TENSORS, "embed_dim": width, "depth": depth}
        sources.append(load_source("test_vit", name=name, pretrained=False, licence="cc0-1.0", arguments=arguments))
        for place, parameter in enumerate(sources[-1].module.parameters()):
            numbers = (torch.arange(parameter.numel()) + 37 * place) ** 2 % 1009
            parameter.data = (numbers.double() / 1009 - 0.5).float().view_as(parameter)
    return sources


def images(count: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images and their classes, in each of which another channel is bright; no random numbers, which may change."""
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    numbers = torch.arange(first * size, (first + count) * size) ** 2 % 1009
    labels = torch.arange(first, first + count) % 3
    bright = torch.nn.functional.one_hot(labels, 3).view(-1, 3, 1, 1)
    return (numbers.double() / 1009).float().view(-1, *SHAPE) / 4 + bright * 0.75, labels


def search(journal: Path | None = None) -> tuple[Pool, SearchResult]:
    """A search by labels; a journal that has its answers gives them."""
    pool = Pool(tiny_sources(), SHAPE, settings=CalibrationSettings(granularity=["blocks.0"]))
    options = {"strategy": Beam(width=1), "max_candidates": 1, "exits": False, "num_classes": 3, "journal": journal}
    return pool, pool.search([images(6)], [images(9, first=100)], **options)


def make() -> None:
    """Write all files anew."""
    shutil.rmtree(SAVED, ignore_errors=True)
    pool, result = search(SAVED / "journal")
    assert result.best_stitched is not None
    network = pool.assemble(result.best_stitched.candidate)
    examples, labels = images(12, first=200)
    with torch.no_grad():
        head = fit_head(network(examples), labels)
    classifier = StitchedClassifier(num_classes=3, class_names=NAMES)
    classifier.install(network, head)
    classifier.eval().save_pretrained(SAVED / "classifier")
    (SAVED / "classifier" / "composition.png").unlink()  # nothing reads it
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(SAVED / "classifier.ckpt", weights_only=True)
    with torch.no_grad():
        logits = classifier(images(4, first=300)[0])
    expected = {
        "versions": {package: version(package) for package in ("lightning_stitch", "torch")},
        "logits": logits.tolist(),
        "recipe": network.recipe.to_dict(),
        "scores": [ranked.score for ranked in result.ranked],
    }
    (SAVED / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make()
