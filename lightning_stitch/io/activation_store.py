"""Keep activations of all calibration images without holding them in memory.

They are written to an unnamed temporary file and read again a few images at a time, so that a search holds its sampled
rows alone, whatever the image size. The file is gone when nothing refers to it any more, or when the process ends.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.settings import Keeping

Portion = Callable[[], Tensor]


def lies_channels_last(x: Tensor) -> bool:
    """Whether a map (batch, channels, height, width) lies in memory as (batch, height, width, channels)."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Spool:
    """Where tensors are put down: "disk", a temporary file in the directory that TMPDIR names, or "memory"."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._file: IO[bytes] | None = None
        self._end = 0

    def put(self, x: Tensor) -> Portion:
        """Put a tensor down; calling the result takes it up again, on its device.

        Raises:
            CalibrationError: If the disk is full.
        """
        if self._keeping == "memory":
            return lambda: x
        # What lies channels-last comes back so, on which results depend in the last bit.
        last = lies_channels_last(x)
        laid_out = (x.permute(0, 2, 3, 1) if last else x).detach().contiguous()
        begin, raw = self._end, laid_out.cpu().view(-1).view(torch.uint8)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when nothing refers to it any more
                weakref.finalize(self, self._file.close)
            self._file.seek(begin)
            self._file.write(raw.numpy().data)
            self._file.flush()
        except OSError as error:
            raise CalibrationError(
                f"Activations of the calibration images cannot be written to {tempfile.gettempdir()}: {error}. Name "
                f'another directory in TMPDIR, or keep them in memory (keep_activations="memory").'
            ) from error
        self._end += len(raw)
        shape, dtype, device = laid_out.shape, x.dtype, x.device

        def take_up() -> Tensor:
            taken = self._read(begin, shape, dtype).to(device)
            return taken.permute(0, 3, 1, 2) if last else taken

        return take_up

    def _read(self, begin: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        assert self._file is not None
        x = torch.empty(shape, dtype=dtype)
        self._file.seek(begin)
        count = self._file.readinto(x.view(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        if count != x.nbytes:
            raise CalibrationError(
                f"Activations that were put down in {tempfile.gettempdir()} were cut short: {count} of {x.nbytes} "
                f"bytes are left. Search again with another directory in TMPDIR, or keep them in memory "
                f'(keep_activations="memory").'
            )
        return x


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """One activation of all calibration images; iterating takes up its portions, of a few images each."""

    portions: Sequence[Portion]

    def __iter__(self) -> Iterator[Tensor]:
        return (take_up() for take_up in self.portions)

    def whole(self) -> Tensor:
        """All images in one tensor."""
        return torch.cat(list(self))


class Deferred(Sequence[Portion]):
    """Portions that `make` makes of an activation, itself perhaps deferred, when they are first asked for."""

    def __init__(self, before: Carried, make: Callable[[Carried], Carried]) -> None:
        self._before: Carried | None = before
        self._make = make
        self._portions: Sequence[Portion] = ()

    def __len__(self) -> int:
        return len(self._compute())

    def __getitem__(self, index: Any) -> Any:
        return self._compute()[index]

    def _compute(self) -> Sequence[Portion]:
        # From the first to the last instead of each asking the one before: there may be more than Python can nest.
        pending: list[Deferred] = []
        last: Sequence[Portion] = self
        while isinstance(last, Deferred) and last._before is not None:
            pending.append(last)
            last = last._before.portions
        for deferred in reversed(pending):
            assert deferred._before is not None
            deferred._portions = deferred._make(deferred._before).portions
            # What it was made from is let go.
            deferred._before = None
        return self._portions


def carry(portions: Iterable[Tensor], spool: Spool) -> Carried:
    """Put an activation down, portion by portion."""
    return Carried([spool.put(portion) for portion in portions])
