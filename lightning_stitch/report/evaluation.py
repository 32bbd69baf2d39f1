"""What one network did on the test images: its scores, with their intervals, and its costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import StitchError

METRICS = ("accuracy", "balanced_accuracy", "auroc")
# Entries of one resamples x images block: 32 MB in float64.
_BLOCK = 4_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What one network predicted on the test images, and what it cost.

    Attributes:
        name: Name in the table.
        kind: What it is made of (`report.kinds`).
        probabilities: Class probabilities, images x classes, floating point, on any device.
        params: Number of parameters.
        macs: Multiply-accumulates of one image, at most.
        seconds: Wall time that it took to make (search, stitches, head).
        labels: Number of labelled images that were used to make it.
        cka_product: Product of the CKAs of its stitches.
        budget: The budgets under which it was chosen, in words, such as "<= 50% of MACs".
        sources: The sources that its fragments come from.
        label: What sentences call it; None: its name.
        mean_macs: Multiply-accumulates of a test image on average, where not all go all the way; None: all do.

    Raises:
        StitchError: If a probability is not finite.
    """

    name: str
    kind: str
    probabilities: Tensor
    params: int
    macs: int
    seconds: float
    labels: int
    cka_product: float | None = None
    budget: str | None = None
    sources: tuple[str, ...] = ()
    label: str | None = None
    mean_macs: float | None = None

    def __post_init__(self) -> None:
        """Check the probabilities."""
        finite = self.probabilities.isfinite().all(1)
        if not finite.all():
            raise StitchError(
                f"{self.name}: {int((~finite).sum())} of {len(finite)} images have NaN or infinite probabilities."
            )

    @property
    def expected_macs(self) -> float:
        """Multiply-accumulates of a test image on average."""
        return self.macs if self.mean_macs is None else self.mean_macs


def score(
    evaluation: Evaluation, targets: Tensor, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """Accuracy, balanced accuracy and AUROC, each with its 95 % interval.

    Balanced accuracy is the mean recall of the classes present. AUROC is that of class 1 where there are two classes,
    else the mean of one-versus-rest over the classes present; ties count one half. The interval is the percentile
    bootstrap over the test images (Efron 1979, "Bootstrap methods: another look at the jackknife"): the noise of these
    test images, not of those that the network was made with. One seed gives the same resamples to every network, and
    the global random state is left alone.

    Args:
        evaluation: A network's predictions.
        targets: True classes, integers, one for each image.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        `accuracy`, `accuracy_low`, `accuracy_high`, and likewise `balanced_accuracy` and `auroc`, which is None where
        only one class is present.

    Raises:
        StitchError: If targets and probabilities do not fit each other.

    Example:
        >>> sure = Evaluation("sure", "source", torch.eye(2).repeat(9, 1), params=1, macs=1, seconds=0.0, labels=0)
        >>> score(sure, torch.tensor([0, 1] * 9))["auroc_low"]
        1.0
    """
    targets = valid_targets(targets, evaluation)
    probabilities = evaluation.probabilities.detach().double().cpu()
    everything = torch.ones(1, len(targets), dtype=torch.double)
    points = _metrics(probabilities, targets, everything)
    blocks = [_metrics(probabilities, targets, w) for w in _resamples(len(targets), num_resamples, seed)]
    result: dict[str, float | None] = {}
    for metric in METRICS:
        low, high = _interval(torch.cat([block[metric] for block in blocks]))
        point = float(points[metric])
        numbers = {metric: point, f"{metric}_low": low, f"{metric}_high": high}
        result |= dict.fromkeys(numbers) if math.isnan(point) else numbers
    return result


def valid_targets(targets: Tensor, evaluation: Evaluation) -> Tensor:
    """Targets as int64 on the CPU, refused with a StitchError where they do not fit the probabilities."""
    num_images, num_classes = evaluation.probabilities.shape
    low, high = targets.aminmax()
    if targets.shape != (num_images,) or targets.is_floating_point() or low < 0 or high >= num_classes:
        raise StitchError(
            f"{evaluation.name} has probabilities for {num_images} images and {num_classes} classes; targets should be "
            f"as many integers from 0 to {num_classes - 1}, found {targets.dtype} of shape {tuple(targets.shape)} from "
            f"{low} to {high}."
        )
    return targets.detach().long().cpu()


def correct(evaluation: Evaluation, targets: Tensor) -> Tensor:
    """1.0 for each image that is classified right, else 0.0."""
    return (evaluation.probabilities.detach().cpu().argmax(1) == targets).double()


def _resamples(num_images: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Bootstrap resamples as counts, resamples x images, in blocks: multinomial, each row sums to `num_images`."""
    generator = torch.Generator().manual_seed(seed)
    height = max(1, _BLOCK // num_images)
    for start in range(0, num_resamples, height):
        picks = torch.randint(num_images, (min(height, num_resamples - start), num_images), generator=generator)
        counts = torch.zeros(picks.shape, dtype=torch.double)
        yield counts.scatter_add_(1, picks, torch.ones_like(counts))


def _interval(values: Tensor) -> tuple[float, float]:
    """The middle 95 %; NaN (a resample without two classes) does not count."""
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return float(low), float(high)


def _metrics(probabilities: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Each metric under every row of weights (resamples x images); NaN where it is undefined."""
    num_classes = probabilities.shape[1]
    right = (probabilities.argmax(1) == targets).double()
    members = torch.nn.functional.one_hot(targets, num_classes).double()
    recalls = (weights @ (members * right[:, None])) / (weights @ members)
    classes = [1] if num_classes == 2 else targets.unique().tolist()
    curves = [_auroc(probabilities[:, c], targets == c, weights) for c in classes]
    return {
        "accuracy": weights @ right / weights.sum(1),
        "balanced_accuracy": recalls.nanmean(1),
        "auroc": torch.stack(curves).nanmean(0),
    }


def _auroc(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Probability that a positive scores above a negative, ties one half (Mann-Whitney), under every row of weights."""
    order = scores.argsort()
    _, group, sizes = scores[order].unique_consecutive(return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0)
    positive, weights = positive[order], weights[:, order]
    below = torch.nn.functional.pad((weights * ~positive).cumsum(1), (1, 0))
    # Weight of the negatives below each positive's group of ties, and half of those within it.
    group = group[positive]
    beaten = (below[:, (ends - sizes)[group]] + below[:, ends[group]]) / 2
    wins = weights[:, positive]
    return (wins * beaten).sum(1) / (wins.sum(1) * below[:, -1])
