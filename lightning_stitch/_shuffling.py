"""A random order of a dataset for each epoch that depends on seed and epoch alone, so that a resumed run has it too."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import RandomSampler

_STRIDE = 1_000_003  # Keeps the epochs of one seed apart from those of its neighbours.


class EpochShuffle(RandomSampler):
    """Random order, another one in each epoch.

    A Trainer tells it the epoch; without that every pass is the next epoch. It is a `RandomSampler` because that is how
    Lightning knows that a loader shuffles.

    Args:
        dataset: What is sampled from.
        seed: The seed.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The order; the epoch is read when the first index is taken, which may be after `set_epoch`."""
        generator = torch.Generator().manual_seed(self._seed + _STRIDE * self._epoch)
        self._epoch += 1
        yield from torch.randperm(len(self), generator=generator).tolist()
