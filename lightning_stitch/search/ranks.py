"""Processes that search together: each does its share of the work, and all get what all found.

Every rank is given the same images and proposes the same candidates; the passes over images, and the judging of what
they gave, are divided. Before each exchange ranks tell each other whether one has failed, so that its own words end all
of them at their next meeting, and none waits for one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lightning_stitch.errors import CalibrationError, StitchError, first_lines
from lightning_stitch.io import key_of

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


class OtherRankFailed(StitchError):
    """Another rank has failed; the message has its words."""


class Ranks:
    """One process, which does everything.

    Attributes:
        index: Which of the ranks this is.
        count: How many there are.
    """

    index = 0
    count = 1

    def does(self, number: int) -> bool:
        """Whether a piece of work of this number is this rank's."""
        return number % self.count == self.index

    def agree(self, value: Any) -> bool:
        """Whether all ranks have this value, of plain JSON."""
        return True

    def of_first(self, make: Callable[[], _Value]) -> _Value:
        """What rank zero makes, which the others do not."""
        return make()

    def gather(self, own: Tensor, num_rows: Sequence[int]) -> list[Tensor]:
        """Every rank's rows (num_rows[rank] x width), own ones among them."""
        return [own]

    def share(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[_Value]]) -> list[_Value]:
        """What work gives for each item, the same for all ranks; each does some in a row.

        A CalibrationError of one rank's share is raised by all.
        """
        return list(work(items))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do, in which they meet: an error of one ends all."""
        yield


ALONE = Ranks()


class DistributedRanks(Ranks):
    """The ranks of `torch.distributed`'s default group, as Lightning's strategies set it up.

    Args:
        device: Where tensors are exchanged, for backends that do so on accelerators alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.index, self.count = distributed.get_rank(), distributed.get_world_size()
        self._device = device if distributed.get_backend() == "nccl" else torch.device("cpu")

    def agree(self, value: Any) -> bool:
        """As in `Ranks`; a meeting."""
        return len(set(self._meet(key_of(value)))) == 1

    def of_first(self, make: Callable[[], _Value]) -> _Value:
        """As in `Ranks`; a meeting."""
        return self._meet(make() if self.index == 0 else None)[0]

    def gather(self, own: Tensor, num_rows: Sequence[int]) -> list[Tensor]:
        """As in `Ranks`; a meeting."""
        self._meet(None)
        padded = torch.zeros(max(num_rows), own.shape[1], dtype=own.dtype, device=self._device)
        padded[: len(own)] = own.to(self._device)
        parts = [torch.empty_like(padded) for _ in num_rows]
        distributed.all_gather(parts, padded)
        return [part[:count].to(own.device) for part, count in zip(parts, num_rows, strict=True)]

    def share(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[_Value]]) -> list[_Value]:
        """As in `Ranks`; a meeting."""
        first, last = (len(items) * rank // self.count for rank in (self.index, self.index + 1))
        own: list[_Value] | CalibrationError
        try:
            own = list(work(items[first:last]))
        except CalibrationError as error:
            own = error
        results: list[_Value] = []
        for part in self._meet(own):
            if isinstance(part, CalibrationError):
                raise part
            results += part
        return results

    @contextmanager
    def together(self) -> Iterator[None]:
        """As in `Ranks`; its end is a meeting."""
        try:
            yield
        except OtherRankFailed:
            raise
        except BaseException as error:
            self._exchange((first_lines(error), None))
            raise
        self._meet(None)

    def _meet(self, value: Any) -> list[Any]:
        """Every rank's value.

        Raises:
            OtherRankFailed: If one came here with an error.
        """
        told = self._exchange((None, value))
        for rank, (error, _) in enumerate(told):
            if error is not None:
                raise OtherRankFailed(f"Rank {rank} of {self.count} failed, and with it this one. {error}")
        return [value for _, value in told]

    def _exchange(self, word: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
        told: list[Any] = [None] * self.count
        distributed.all_gather_object(told, word)
        return told
