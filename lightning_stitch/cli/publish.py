"""`lightning-stitch publish CHECKPOINT REPO`: share the network of a checkpoint on the hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_stitch.errors import StitchError
from lightning_stitch.hub import CardDetails, open_pretrained, publish
from lightning_stitch.networks import StitchedNetwork
from lightning_stitch.training import StitchedClassifier, open_classifier

USAGE = "lightning-stitch publish CHECKPOINT REPO shares a network on the hub; see lightning-stitch publish --help."


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="lightning-stitch publish",
        description="Publish the network of a checkpoint on the hub, with head, class names and a card, in one commit.",
    )
    made.add_argument("checkpoint", help="a checkpoint such as stitched.ckpt, or a saved folder")
    made.add_argument("repo", help="ORG/NAME; made if it does not exist")
    visibility = made.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="a private repository")
    visibility.add_argument("--public", dest="private", action="store_false", help="a public repository")
    made.add_argument("--revision", help="a branch, made if it does not exist (default main)")
    made.add_argument(
        "--existing-card", choices=["refuse", "keep", "replace"], default="refuse", help="what becomes of a README.md"
    )
    made.add_argument("--message", default="Publish a stitched network", help="of the commit")
    made.add_argument("--dataset", help="the data it was made for: an id on the hub, or a name")
    made.add_argument("--metric", action="append", default=[], metavar="NAME=VALUE", help="what was measured on them")
    made.add_argument("--split", default="test", help="the part of the data the metrics are of (default test)")
    made.add_argument("--num-images", type=int, help="how many images that are")
    made.add_argument(
        "--comparison", help="comparison.json of the search, for the card (default: beside the checkpoint, if there)"
    )
    made.add_argument("--command", help="the command that makes the network again, for the card")
    made.add_argument("--licence", help="your word on the licence, where the sources' do not tell it")
    made.add_argument("--licence-override", metavar="REASON", help="why it may be shared although a licence forbids it")
    made.add_argument("--class-names", nargs="+", help="names of the classes, instead of the checkpoint's")
    return made


def publish_checkpoint(arguments: Sequence[str]) -> None:
    """Publish a checkpoint and print where it is.

    Raises:
        StitchError: If the checkpoint or an option cannot be used, or as `publish`.
    """
    options = parser().parse_args(arguments)
    table = _comparison(options.comparison, Path(options.checkpoint))
    details = CardDetails(
        dataset=options.dataset,
        metrics=dict(map(_metric, options.metric)),
        split=options.split,
        num_images=options.num_images,
        rows=table.get("rows", []),
        verdict=table.get("verdict"),
        command=options.command,
        licence=options.licence,
        licence_override=options.licence_override,
    )
    network = _opened(options.checkpoint)
    if options.class_names:
        if not isinstance(network, StitchedClassifier):
            raise StitchError(f"--class-names names a classifier's outputs; {options.checkpoint} holds none.")
        network.class_names = options.class_names
    found = publish(
        network,
        options.repo,
        private=options.private,
        revision=options.revision,
        details=details,
        existing_card=options.existing_card,
        commit_message=options.message,
    )
    print(f"Published {found.url}\ncommit {found.commit}")


def _opened(where: str) -> StitchedClassifier | StitchedNetwork:
    """What a checkpoint or a saved folder holds."""
    if Path(where).is_dir() and open_pretrained(where, weights=False).kind != "classifier":
        return StitchedNetwork.from_pretrained(where)
    return open_classifier(where)


def _metric(words: str) -> tuple[str, float]:
    name, equals, value = words.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(value)
    except ValueError as error:
        raise StitchError(f"--metric takes NAME=VALUE, such as accuracy=0.93; found {words!r}.") from error


def _comparison(given: str | None, checkpoint: Path) -> dict[str, Any]:
    path = Path(given) if given else checkpoint.parent / "comparison.json"
    if not given and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["rows"], list) or not all(isinstance(row, dict) for row in found["rows"]):
            raise TypeError("rows should be a list of tables' rows")
        if not isinstance(found.get("verdict"), str | None):
            raise TypeError("verdict should be a sentence")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StitchError(f"{path} is no comparison.json of a search ({error}).") from error
