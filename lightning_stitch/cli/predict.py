"""`lightning-stitch predict CHECKPOINT IMAGES...`: class names and probabilities of image files."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_stitch._lightning import NAMESPACE
from lightning_stitch.report import as_csv
from lightning_stitch.training import ImageFiles, open_classifier, predict_files

USAGE = "lightning-stitch predict CHECKPOINT IMAGES ... predicts image files; see lightning-stitch predict --help."


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="lightning-stitch predict",
        description="Predict the classes of image files. Their size and channels come from the checkpoint.",
    )
    made.add_argument("checkpoint", help="a checkpoint such as stitched.ckpt, a saved folder, or hf-hub:ORG/NAME")
    made.add_argument("images", nargs="+", help="image files, and folders of them (those in folders inside too)")
    made.add_argument("--output", help="a .csv or .jsonl file; without it CSV is printed")
    made.add_argument("--overwrite", action="store_true", help="replace the output file if it is there")
    made.add_argument("--skip-unreadable", action="store_true", help="leave out files that cannot be decoded")
    made.add_argument("--class-names", nargs="+", help="names of the classes, instead of the checkpoint's")
    made.add_argument("--batch-size", type=int, default=32, help="images in a batch (default 32)")
    made.add_argument("--num-workers", type=int, default=0, help="processes that read images (default 0)")
    made.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    return made


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether a command line is this command's, and not `predict` of LightningCLI, which takes options alone."""
    if list(arguments[:1]) != ["predict"]:
        return False
    if len(arguments) == 1:
        return True
    own = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    return not arguments[1].startswith("-") or arguments[1].split("=")[0] in own


def predict(arguments: Sequence[str]) -> None:
    """Predict image files with a checkpoint; print the predictions or write them into a file.

    Raises:
        StitchError: If the checkpoint, an image, the device or the output file cannot be used.
    """
    options = parser().parse_args(arguments)
    module = open_classifier(options.checkpoint)
    if options.class_names:
        module.class_names = options.class_names
    elif module.class_names is None:
        print(
            f"{options.checkpoint} holds no class names, so classes are numbered from 0; give them with --class-names.",
            file=sys.stderr,
        )
    images = ImageFiles(options.images, options.batch_size, options.num_workers, options.skip_unreadable)
    with _without_lightnings_notes():
        rows = predict_files(
            module,
            images,
            output=options.output,
            overwrite=options.overwrite,
            device=options.device,
            progress=options.output is not None,
        )
    for reason in images.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    if options.output is None:
        print(as_csv(rows), end="")
    else:
        print(f"Wrote {len(rows)} row{'s' * (len(rows) != 1)} to {options.output}.")


@contextmanager
def _without_lightnings_notes() -> Iterator[None]:
    """Silence what Lightning tells of devices and workers, and what torch tells Lightning's developers."""
    logger = logging.getLogger(NAMESPACE)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            yield
    finally:
        logger.setLevel(level)
