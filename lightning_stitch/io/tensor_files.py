"""Files that are either there in full or not there at all: written under another name, and renamed when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The words of safetensors."""

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
