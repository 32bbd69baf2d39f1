"""A shorter version of one network: skips within it, healed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths import r2
from lightning_stitch.networks import StitchedNetwork
from lightning_stitch.progress import Progress
from lightning_stitch.search import Beam, Ranked, SearchResult, SelectionData
from lightning_stitch.settings import CalibrationSettings, SearchSettings
from lightning_stitch.sources import Source
from lightning_stitch.stitching import Candidate, images_of


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A network made shorter.

    Attributes:
        network: The network, in eval mode; it takes images in [0, 1] and gives what the source gives.
        fidelity: R2 of what it gives against what the source gives, on the selection images; 1 where they are equal.
        chosen: Its candidate with all figures.
        result: All that the search found; `result.pareto()` are the best of every size.
    """

    network: StitchedNetwork
    fidelity: float
    chosen: Ranked
    result: SearchResult


def shrink(
    source: Source,
    calibration: Iterable[Tensor | Sequence[Tensor]],
    selection: Iterable[Tensor | Sequence[Tensor]],
    budget: Budget | float,
    *,
    calibration_settings: CalibrationSettings | None = None,
    groups: Sequence[Hashable] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Shrunk:
    """The short version of one network that stays truest to it, without labels or back-propagation.

    The source is searched alone: its parts are skipped, what is left is stitched, and the layers behind the stitch are
    healed (`lightning_stitch.healing.healing`). (With skips alone, unhealed, and in a transformer, this is ReplaceMe's
    method, arXiv 2505.02819.)

    Args:
        source: The network.
        calibration: Batches of images, (batch, channels, height, width) in [0, 1], of the task; labels are not looked
            at.
        selection: Others, which choose among the versions.
        budget: Limits that it keeps; a number between 0 and 1: a share of the source's MACs. With `min_score`, a least
            fidelity, it is the version of the fewest MACs that is so true.
        calibration_settings: How activations are sampled and where the network ends; None: at its output.
        groups: What each calibration image shows (`Pool.calibrate`).
        device: Where to run.
        progress: Where to show progress.
        options: Others than these of `SearchSettings`: the strategy `Beam(max_fragments=2, width=6, deep=6)`, of one
            skip; healing; and as the ranking how true a version is.

    Returns:
        The version, with its fidelity: the source itself where that keeps the budget and no least fidelity was asked
        for.

    Raises:
        BudgetError: If no version keeps the budget; names the one that comes nearest.
        CalibrationError: If the images cannot be used.

    Example:
        >>> import torch
        >>> from lightning_stitch import load_source, shrink
        >>> source = load_source("test_resnet", pretrained=False)
        >>> images = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> short = shrink(source, [images[:16]], [images[16:]], 0.75)
        >>> short.network(images).shape
        torch.Size([24, 1000])
        >>> short.chosen.candidate.kind
        'shortened'
    """
    calibration = list(calibration)
    if not calibration:
        raise CalibrationError("There are no calibration images.")
    channels, height, width = images_of(calibration[0]).shape[1:]
    shape = (channels, height, width)
    pool = Pool([source], shape, settings=calibration_settings or CalibrationSettings(until="output"), device=device)
    if not isinstance(budget, Budget):
        budget = Budget(max_macs=budget * pool.parts[0].cost.macs)
    beam = Beam(max_fragments=2, width=6, deep=6)
    settings = SearchSettings(strategy=beam, budget=budget, ranking=by_fidelity, exits=False, heal=True)
    result = pool.search(calibration, selection, settings, groups=groups, progress=progress, **options)
    best = result.best
    return Shrunk(pool.assemble(best.candidate), best.scores["fidelity"], best, result)


def by_fidelity(candidates: Sequence[Candidate], selection: SelectionData) -> list[Mapping[str, float]]:
    """R2 of what a network gives against what its last source gives, nothing fitted in between."""
    return [
        {"fidelity": r2(x, of_source)} for x, of_source in zip(selection.features, selection.own_features, strict=True)
    ]
