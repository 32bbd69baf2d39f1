"""`lightning-stitch publish CHECKPOINT REPO`: share the network of a checkpoint on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_stitch.errors import StitchError

if TYPE_CHECKING:
    from lightning_stitch.networks import StitchedNetwork
    from lightning_stitch.training import StitchedClassifier


def publish(
    checkpoint: str,
    repo: str,
    private: bool | None = None,
    revision: str | None = None,
    existing_card: Literal["refuse", "keep", "replace"] = "refuse",
    message: str = "Publish a stitched network",
    dataset: str | None = None,
    metrics: dict[str, float] = {},  # noqa: B006 (never changed; shown as the default in the help)
    split: str = "test",
    num_images: int | None = None,
    comparison: str | None = None,
    command: str | None = None,
    licence: str | None = None,
    licence_override: str | None = None,
    class_names: list[str] | None = None,
    space: bool = False,
) -> None:
    """Publish the network of a checkpoint on the hub, with head, class names and a card, in one commit.

    Args:
        checkpoint: A checkpoint such as stitched.ckpt, or a saved folder.
        repo: ORG/NAME; made if it does not exist.
        private: Whether the repository is private; null leaves it as it is, or to the hub.
        revision: A branch, made if it does not exist; null is main.
        existing_card: What becomes of a README.md that is there.
        message: Of the commit.
        dataset: The data it was made for: an id on the hub, or a name.
        metrics: What was measured on them, such as --metrics.accuracy 0.93.
        split: The part of the data that the metrics are of.
        num_images: How many images that are.
        comparison: The comparison.json of the search, for the card; null is the one beside the checkpoint, if there.
        command: The command that makes the network again, for the card.
        licence: Your word on the licence, where the sources' do not tell it.
        licence_override: The reason why it may be shared although a licence forbids it.
        class_names: Names of the classes, instead of the checkpoint's.
        space: Also publish a Space of the same name, whose page predicts with it.

    Raises:
        StitchError: If the checkpoint or an option cannot be used, or as `lightning_stitch.publish`.
    """
    from lightning_stitch.hub import CardDetails
    from lightning_stitch.hub import publish as publish_network
    from lightning_stitch.training import StitchedClassifier

    table = _comparison(comparison, Path(checkpoint))
    details = CardDetails(
        dataset=dataset,
        metrics=metrics,
        split=split,
        num_images=num_images,
        rows=table.get("rows", []),
        verdict=table.get("verdict"),
        command=command,
        licence=licence,
        licence_override=licence_override,
    )
    network = network_of(checkpoint)
    if class_names:
        if not isinstance(network, StitchedClassifier):
            raise StitchError(f"--class_names names a classifier's outputs; {checkpoint} holds none.")
        network.class_names = class_names
    published = publish_network(
        network,
        repo,
        private=private,
        revision=revision,
        details=details,
        existing_card=existing_card,
        commit_message=message,
        space=space,
    )
    print(f"Published {published.url}\ncommit {published.commit}")
    if published.space is not None:
        print(f"It is shown at {published.space}")


def network_of(checkpoint: str) -> StitchedClassifier | StitchedNetwork:
    """What a checkpoint or a saved folder holds."""
    from lightning_stitch.hub import open_pretrained
    from lightning_stitch.networks import StitchedNetwork
    from lightning_stitch.training import open_classifier

    if Path(checkpoint).is_dir() and open_pretrained(checkpoint, weights=False).kind != "classifier":
        return StitchedNetwork.from_pretrained(checkpoint)
    return open_classifier(checkpoint)


def _comparison(file: str | None, checkpoint: Path) -> dict[str, Any]:
    """The record that a search wrote of its comparison; empty where none is named and none is beside the checkpoint."""
    path = Path(file) if file else checkpoint.parent / "comparison.json"
    if not file and not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["rows"], list) or not all(isinstance(row, dict) for row in record["rows"]):
            raise TypeError("rows should be a list of tables' rows")
        if not isinstance(record.get("verdict"), str | None):
            raise TypeError("verdict should be a sentence")
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StitchError(f"{path} is no comparison.json of a search ({error}).") from error
