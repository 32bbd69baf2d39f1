"""What a stitched network gives for the very images that its stitch is fitted on, as though it had not seen them.

The images are dealt into folds. Each image passes a stitch that was fitted on the other folds alone (cross-fitting),
and then the receiver's own layers, which were fitted on none. So every image counts in the fit of the final stitch and
in the judgement, and none judges a fit on itself. The folds' stitches are fitted on fewer images than the final one:
the judgement is a little too hard, not too mild.

Each fold's stitch leaves its own mark on the features. Were the classes not spread evenly over the folds, a head could
read the class off that mark; so each class is dealt by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_stitch.maths import ridge_least_squares
from lightning_stitch.recipe import Statistic
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate, Reading, Stitch, chunks, rows_to_fit, stitch_from_fit


def deal_into_folds(num_images: int, labels: Tensor | None, *, folds: int) -> Tensor:
    """The fold of each image, from 0: the images of one class (all, without labels) go to each fold in turn.

    Where no class has two images, the images are dealt as though they were of one.
    """
    if labels is None or int(labels.bincount().max()) < 2:
        return torch.arange(num_images) % folds
    same = labels[:, None] == labels
    return (same.tril().sum(1) - 1) % folds


@torch.inference_mode()
def cross_fitted_vectors(
    candidate: Candidate,
    sources: Sequence[Calibrated],
    settings: CalibrationSettings,
    *,
    fold_of: Tensor,
    ridge: float,
) -> list[Tensor]:
    """What each tap of a network of two fragments gives (images x width), each image's by a stitch without it.

    The receiver runs once over the images; the front does not run, its activation being at hand. `fold_of` gives the
    fold of each image (`deal_into_folds`), `ridge` the relative strength of the stitches' fit, above 0.
    """
    stitches = _fit_by_fold(candidate, sources, settings, fold_of=fold_of, ridge=ridge)

    def enter(x: Tensor, first_image: int) -> Tensor:
        folds = fold_of[first_image : first_image + len(x)].to(x.device)
        entered = torch.cat([stitch(x[folds == fold]) for fold, stitch in enumerate(stitches) if (folds == fold).any()])
        # Back in the order of the images after each fold's went through its own stitch.
        return entered[folds.argsort(stable=True).argsort()]

    return _vectors_behind(candidate, sources, enter)


@torch.inference_mode()
def final_vectors(candidate: Candidate, sources: Sequence[Calibrated]) -> list[Tensor]:
    """The same by the stitch that the network has."""
    stitch = candidate.steps[1].stitch
    assert stitch is not None
    return _vectors_behind(candidate, sources, lambda x, first_image: stitch(x))


def vectors_of_piece(source: Calibrated, piece: int, statistics: tuple[Statistic, ...]) -> Tensor:
    """What a tap behind a piece gives (images x width): the calibration kept the activations there."""
    if piece == len(source.parts.cuts):
        return source.features
    reading = Reading(source.parts.cuts[piece], statistics)
    return torch.cat([reading(x) for x in source.activations[piece]])


def _vectors_behind(
    candidate: Candidate, sources: Sequence[Calibrated], enter: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """What each tap gives, those before the stitch from the activations at hand, those behind it run."""
    front, tail = candidate.steps
    receiver, num_before = sources[tail.source], front.last - front.first
    reads = {read.num_pieces: read for read in candidate.reads}
    before = [
        vectors_of_piece(sources[front.source], count - 1, read.statistics)
        for count, read in reads.items()
        if count <= num_before
    ]
    behind: dict[int, list[Tensor]] = {count: [] for count in reads if count > num_before}
    first = 0
    for x in sources[front.source].activations[front.last - 1]:
        for chunk in chunks(enter(x, first), receiver.parts.images_at_once):
            for count, piece in enumerate(range(tail.first, tail.last), start=num_before + 1):
                chunk = receiver.parts.fused[piece](chunk)
                if count in reads:
                    cut = receiver.parts.cuts[piece] if piece < len(receiver.parts.cuts) else None
                    behind[count].append(Reading(cut, reads[count].statistics)(chunk).float())
        first += len(x)
    return before + [torch.cat(portions) for portions in behind.values()]


def _fit_by_fold(
    candidate: Candidate, sources: Sequence[Calibrated], settings: CalibrationSettings, *, fold_of: Tensor, ridge: float
) -> list[Stitch]:
    front, tail = candidate.steps
    assert tail.spec is not None
    sender, receiver = sources[front.source], sources[tail.source].statistics[tail.first - 1]
    activation, cut = sender.activations[front.last - 1], sender.parts.cuts[front.last - 1]
    rows = rows_to_fit(tail.spec, activation, cut, receiver, settings)
    assert rows is not None  # or there would be no candidate
    x, y = rows
    fold_of = fold_of.to(x.device)
    by_row = fold_of.repeat_interleave(len(x) // len(fold_of))
    stitches = []
    for fold in range(int(fold_of.max()) + 1):
        seen = by_row != fold
        affine = ridge_least_squares(x[seen], y[seen], ridge=ridge, bias=tail.spec.bias, diagnose=False)
        prefix = None if receiver.prefix_rows is None else receiver.prefix_rows[fold_of != fold].mean(0)
        stitches.append(stitch_from_fit(tail.spec, affine, prefix=prefix))
    return stitches
