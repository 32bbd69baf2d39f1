"""How long one image takes, measured where the networks are to run.

The time of a network is the median of `RUNS` runs of one image, a batch of its own, after `WARM_UP` runs that do not
count: in eval mode and inference mode, fused (`StitchedNetwork.fused`) where a search measures, with the threads that
torch has at that moment, and waiting for the device before each look at the clock. What a search goes by before there
is a network is an estimate, the sum of its pieces' times, each measured alike; a source's pieces in a row take longer
than the source itself, by what each call and each wait adds, and are scaled to take as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_stitch.cutting import fuse
from lightning_stitch.stitching import Segmented

WARM_UP, RUNS = 3, 9


def network_latency(network: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> float:
    """Milliseconds that a network, in eval mode on the device, takes for one image (channels, height, width)."""
    return _milliseconds(network, _image(image_shape, device), device)


@torch.inference_mode()
def latency_per_image(run: Callable[[Tensor], object], images: Tensor, *, batch_size: int) -> float:
    """Milliseconds an image takes in batches of some size, on average, after one batch that does not count.

    Args:
        run: Takes batches of images.
        images: (images, channels, height, width), on the device where `run` computes. Where images stop when a network
            is sure of them, it is these that say how many.
        batch_size: Images at once.
    """
    device, batches = images.device, images.split(batch_size)
    run(batches[0])
    _wait_for(device)
    begun = time.perf_counter()
    for batch in batches:
        run(batch)
    _wait_for(device)
    return 1000 * (time.perf_counter() - begun) / len(images)


@torch.inference_mode()
def piece_latencies(parts: Sequence[Segmented], device: torch.device) -> list[list[float]]:
    """Milliseconds of each piece of each source on the device; the first one's includes the preprocessing."""
    latencies = []
    for part in parts:
        whole = nn.Sequential(part.preprocess, fuse(part.graph.fragment(None, part.end, share=True).eval())).to(device)
        x = _image(part.image_shape, device)
        total, times = _milliseconds(whole, x, device), []
        for piece in (nn.Sequential(part.preprocess, part.fused[0]), *part.fused[1:]):
            times.append(_milliseconds(piece, x, device))
            x = piece(x)
        scale = total / max(sum(times), 1e-9)
        latencies.append([milliseconds * scale for milliseconds in times])
    return latencies


@torch.inference_mode()
def _milliseconds(module: nn.Module, x: Tensor, device: torch.device) -> float:
    times = []
    for _ in range(WARM_UP + RUNS):
        _wait_for(device)
        begun = time.perf_counter()
        module(x)
        _wait_for(device)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[WARM_UP:])


def _wait_for(device: torch.device) -> None:
    """Let an accelerator finish what it has been given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _image(image_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
