"""What a search does for its module's head: check that the data suit it, rank as it needs, fit it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_stitch.composing import Pool
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.progress import Progress
from lightning_stitch.search import NEED_LABELS, Ranking
from lightning_stitch.stitching import Batch, Candidate, WithoutLabels


def check_targets(head: HeadSettings, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
    """Refuse data whose targets are none that the head, the ranking or the comparison can use.

    Args:
        head: The module's head.
        data: The data, set up here if they are not yet.
        ranking: How candidates are ranked.
        compare: Whether candidates are compared on the test images.

    Raises:
        StitchError: Saying what the data have and what was asked for.
    """
    bare = data.task == "none"
    if compare and (bare or head.name == "none" or head.task != "multiclass"):
        raise StitchError(
            f"compare=True tells accuracies of classes; the data have task={data.task!r}, the module has "
            f"task={head.task!r} and head={head.name!r}. Leave it out: candidates.csv has the scores of all candidates."
        )
    if bare:
        if head.needs_targets:
            raise StitchError(
                f"head={head.name!r} is fitted on labelled images, but the data module has task='none'. Give it "
                f"targets and task={head.task!r}, or use head='class_map' or 'none'."
            )
        if ranking in NEED_LABELS:
            raise StitchError(f"ranking={ranking!r} needs labels, but the data module has task='none'; use 'auto'.")
        return
    if head.name == "none":
        return
    if data.task != head.task:
        raise StitchError(
            f"The data module has task={data.task!r}, StitchedClassifier has task={head.task!r}; give both the same."
        )
    if data.num_classes != head.num_classes:
        what = {"multiclass": "classes", "multilabel": "labels", "regression": "numbers for each image"}[head.task]
        raise StitchError(
            f"The data have {data.num_classes} {what}, StitchedClassifier has num_classes={head.num_classes}."
        )
    mapped, names = list(head.class_names or []), data.class_names or []
    if mapped != names and sorted(mapped) == sorted(names):
        raise StitchError(
            f"The class map has the data's classes in another order: {mapped} instead of {names}. Give them in the "
            f"data's order, by which the labels are numbered."
        )


def check_outputs(head: HeadSettings, pool: Pool) -> None:
    """Refuse a class map of classes that the sources do not have, before they run.

    Args:
        head: The module's head.
        pool: The sources, of the same number of outputs where networks end there.

    Raises:
        StitchError: Naming the class.
    """
    if head.until == "output":
        head.empty(pool.parts[0].graph.output_features())


def selection_for(head: HeadSettings, batches: Iterable[Batch], ranking: str | Ranking) -> Iterable[Batch]:
    """The selection images as candidates are ranked by them: without labels, where neither head nor ranking needs any.

    Args:
        head: The module's head.
        batches: Batches of images, or of (images, targets).
        ranking: How candidates are ranked.
    """
    return WithoutLabels(batches) if ranking == "auto" and not head.needs_targets else batches


def fit_candidate_head(
    head: HeadSettings, pool: Pool, candidate: Candidate, batches: Iterable[Batch], progress: Progress
) -> nn.Module:
    """Fit a candidate's head, on labelled images where it takes some; the head can be trained further.

    Args:
        head: The head.
        pool: Where the candidate comes from.
        candidate: The network.
        batches: Batches of (images, targets); of one that needs no targets only the first is run.
        progress: Where to show progress.

    Raises:
        CalibrationError: If features or targets cannot be used.
        StitchError: If a class map does not fit the network's output.
    """
    images = batches if head.needs_targets else [next(iter(batches))]
    outcomes, targets = pool.outcomes([candidate], images, progress=progress)
    with torch.inference_mode(False):
        return head.fit(outcomes[0].features, targets)


def share_head(head: nn.Module, strategy: Any) -> None:
    """Give every rank rank zero's numbers: a head that holds labelled images has as many rows everywhere.

    Args:
        head: This rank's head.
        strategy: The Trainer's, which broadcasts; with one rank nothing changes.
    """
    state = {name: tensor.cpu() for name, tensor in head.state_dict().items()}
    head.load_state_dict(strategy.broadcast(state, src=0))
