"""Files of JSON and of tensors that are either there in full or not there at all.

Each is written under another name and renamed when it is complete. Tensors are in the safetensors format; they are
written one after the other, so that no more than one of them is in memory, and read again one by one.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {word: dtype for dtype, word in _WORDS.items()}

UNFINISHED = ".unfinished"


@contextmanager
def complete_or_absent(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that gets its name when all is written."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON values."""
    with complete_or_absent(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def raw_bytes(x: Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, row by row."""
    raw: memoryview = x.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    return raw


def write_tensors(path: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> int:
    """Write tensors, one at a time in memory; gives the CRC-32 of the file.

    Args:
        path: The file.
        tensors: What gives each tensor, always the same one; it is called twice.
    """
    header, end = {}, 0
    for name, give in tensors.items():
        x = give()
        header[name] = {"dtype": _WORDS[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    # The format wants the numbers to begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    checksum = 0
    with complete_or_absent(path) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        for give in tensors.values():
            numbers = raw_bytes(give())
            checksum = zlib.crc32(numbers, checksum)
            file.write(numbers)
    return checksum


class TensorFile:
    """A file of tensors, found whole when it is opened and read one tensor at a time.

    Args:
        path: The file.
        checksum: Its CRC-32.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is cut short, damaged or no safetensors file.
    """

    def __init__(self, path: Path, checksum: int) -> None:
        # It stays open as long as something refers to it, so that its tensors can be read when its name is gone.
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        found = 0
        while block := self._file.read(2**20):
            found = zlib.crc32(block, found)
        if found != checksum:
            raise ValueError("it is damaged or not the file that was written")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"it is no safetensors file ({error})") from error
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._begin = 8 + length

    def __contains__(self, name: str) -> bool:
        return name in self._header

    @property
    def names(self) -> list[str]:
        """The names of its tensors, in the order in which they were written."""
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._header[name]["shape"])

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in memory of its own."""
        entry = self._header[name]
        x = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        self._file.seek(self._begin + entry["data_offsets"][0])
        self._file.readinto(raw_bytes(x))
        return x
