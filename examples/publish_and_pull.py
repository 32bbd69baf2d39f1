"""A stitched network from one machine to another that has none of its sources.

    hf auth login                                                              # once, or set HF_TOKEN
    python examples/publish_and_pull.py publish --repo ME/stitched-digits      # compose, test and publish
    python examples/publish_and_pull.py pull --repo ME/stitched-digits         # elsewhere: load and test again

`publish` composes a classifier of handwritten digits from small ImageNet networks, with no back-propagation, tests it,
writes its accuracy into the card and publishes all as one commit. `pull` needs the repository's name only, and finds
the same accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Subset, TensorDataset

import lightning_stitch as ls

TEST_IMAGES = 897
SOURCES = ("test_resnet.r160_in1k", "test_efficientnet.r160_in1k")


def digits() -> ls.CalibrationDataModule:
    """Handwritten digits, 8 x 8 pixels of 0 to 16, as images of 32 x 32 in [0, 1]."""
    found = load_digits()
    grey = torch.tensor(found.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    images = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear").clamp(0, 1)
    whole = TensorDataset(images, torch.tensor(found.target))
    parts = [range(600), range(600, 900), range(900, 900 + TEST_IMAGES)]
    train, val, test = (Subset(whole, part) for part in parts)
    return ls.CalibrationDataModule(train=train, val=val, test=test)


def tested(model: ls.StitchedClassifier) -> float:
    """Its accuracy on the test images."""
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    [metrics] = trainer.test(model, digits(), verbose=False)
    return metrics["test_accuracy"]


def publish(repo: str, *, pretrained: bool, private: bool) -> None:
    """Compose a classifier, test it and publish it."""
    sources = [{"spec": spec, "pretrained": pretrained} for spec in SOURCES]
    model = ls.StitchedClassifier(num_classes=10, class_names=[str(digit) for digit in range(10)])
    search = ls.FragmentSearch(sources=sources, max_candidates=8)
    trainer = pl.Trainer(
        max_epochs=0,
        callbacks=[search],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(model, digits())
    # The best of all may be a source as it is; there is nothing to share of that.
    search.install_within(trainer, ls.Budget(), kind="stitched")
    accuracy = tested(model)
    details = ls.CardDetails(
        dataset="Handwritten digits of scikit-learn",
        metrics={"accuracy": accuracy},
        num_images=TEST_IMAGES,
        command=f"python examples/publish_and_pull.py publish --repo {repo}",
    )
    found = ls.publish(model, repo, private=private, details=details)
    print(f"accuracy {accuracy:.4f}\npublished {found.url}\ncommit {found.commit}")


def pull(repo: str) -> None:
    """Load what was published and test it."""
    model = ls.StitchedClassifier.from_pretrained(repo)
    assert model.network is not None
    print(model.network.describe())
    print(f"accuracy {tested(model):.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["publish", "pull"])
    parser.add_argument("--repo", required=True, help="ORG/NAME; to pull also ORG/NAME@REVISION")
    parser.add_argument("--private", action="store_true", help="publish into a private repository")
    parser.add_argument(
        "--random-weights", action="store_true", help="sources without their weights: no download, for a trial"
    )
    options = parser.parse_args(arguments)
    if options.what == "publish":
        publish(options.repo, pretrained=not options.random_weights, private=options.private)
    else:
        pull(options.repo)


if __name__ == "__main__":
    main()
