"""What each of two processes does of a CKA that both compute: here, where a spawned process can import it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_stitch.maths.cka_metric import LinearCKA


def related(n: int, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    y = x @ torch.randn(5, 7, generator=generator) + torch.randn(n, 7, generator=generator)
    return x + offset, y - offset


def run_process(rank: int, folder: str) -> None:
    """One of two processes; the rows are shared out in three ways."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, y = related(40, offset=1000)
    values = []
    for first in (20, 33, 40):  # rank 0 has the first rows, rank 1 the others, which may be none
        own = slice(first) if rank == 0 else slice(first, None)
        metric = LinearCKA()
        if len(x[own]):
            metric.update(x[own], y[own])
            metric.update(x[own], y[own])
            metric.reset()
            metric.update(x[own], y[own])
        values.append(float(metric.compute()))
    # After a value over all processes, each goes on with its own rows.
    metric = LinearCKA()
    for part in (slice(rank, 20, 2), slice(20 + rank, None, 2)):
        metric.update(x[part], y[part])
        values.append(float(metric.compute()))
    torch.save(values, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
