"""Cut the smallest member of every family of timm's and say how it went: CSV on stdout, a summary on stderr.

    python tests/benchmarks/cut_survey.py > survey.csv          # all of timm: about a quarter of an hour on one core
    python tests/benchmarks/cut_survey.py resnet swin_transformer vision_transformer

A family is one module of `timm.list_modules()`. Weights are random, images are of the smallest size of 64, 96, 128, 160
and the native one that the network accepts. "difference" is the largest one between the chain of all fragments and the
network itself, relative to the largest output; "partitioned" tells whether each parameter is in exactly one fragment;
families that share weights between blocks have copies of them in each.
"""

from __future__ import annotations

import csv
import gc
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise

import timm
import torch
from torch import nn

from lightning_stitch import CutError, CutGraph

SIZES = (64, 96, 128, 160)
COLUMNS = [
    *("family", "model", "params", "size", "way", "cuts", "blocks", "formats", "seconds", "difference"),
    *("partitioned", "problem"),
]


def smallest_member(family: str) -> str:
    """The model of a family with the fewest parameters."""
    return min((n for n in timm.list_models(module=family) if not n.startswith("test_")), key=num_parameters)


def num_parameters(name: str) -> int:
    """Counted on the meta device, where weights take no memory; a few networks need real numbers to be built."""
    try:
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False)
    except RuntimeError:
        network = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in network.parameters())


def cut_as_small_as_possible(network: nn.Module) -> CutGraph:
    """The network's graph at the smallest size that it accepts."""
    native = network.pretrained_cfg["input_size"]
    graph = CutGraph(network, tuple(native))
    if network.pretrained_cfg.get("fixed_input_size"):
        return graph
    for size in SIZES:
        if size < native[1]:
            try:
                smaller = graph.at((native[0], size, size))
                with torch.inference_mode():
                    network(torch.rand(1, native[0], size, size))
            except (CutError, RuntimeError, AssertionError, ValueError):
                continue  # too small for it: its native size is sure to do
            return smaller
    return graph


def survey(family: str, model: str) -> dict[str, object]:
    """One row of the table."""
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # some heads begin at zero, and zero is easily reproduced
            parameter += 0.01 * torch.randn_like(parameter)
    row: dict[str, object] = {
        "family": family,
        "model": model,
        "params": sum(parameter.numel() for parameter in network.parameters()),
    }
    begun = time.perf_counter()
    try:
        graph = cut_as_small_as_possible(network)
    except CutError as error:
        return {**row, "problem": str(error)}
    seconds = time.perf_counter() - begun
    cuts = graph.cuts("all")
    names = [None, *(cut.name for cut in graph.cuts("blocks")), None]
    pieces = [graph.fragment(a, b, share=True) for a, b in pairwise(names)]
    owners = Counter(id(p) for a, b in pairwise(names) for p in graph.parameters(a, b))
    images = torch.rand(2, *graph.input_size)
    with torch.inference_mode():
        expected = network(images)
        found = images
        for piece in pieces:
            found = piece(found)
    return {
        **row,
        "size": graph.input_size[1],
        "way": graph.way,
        "cuts": len(cuts),
        "blocks": len(names) - 2,
        "formats": " ".join(f"{format}:{count}" for format, count in Counter(cut.format for cut in cuts).items()),
        "seconds": f"{seconds:.2f}",
        "difference": f"{((found - expected).abs().max() / expected.abs().max()).item():.1e}",
        "partitioned": owners == Counter(id(p) for p in network.parameters()),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    writer = csv.DictWriter(sys.stdout, COLUMNS, restval="")
    writer.writeheader()
    rows = []
    for family in sys.argv[1:] or timm.list_modules():
        if all(name.startswith("test_") for name in timm.list_models(module=family)):
            continue
        try:
            rows.append(survey(family, smallest_member(family)))
        except Exception as error:  # a survey reports every failure and goes on
            rows.append({"family": family, "problem": f"{type(error).__name__}: {error}"})
        writer.writerow({key: str(value).replace("\n", " ")[:300] for key, value in rows[-1].items()})
        sys.stdout.flush()
        gc.collect()
    cut = [row for row in rows if not row.get("problem") and int(str(row["cuts"])) >= 3]
    print(f"{len(cut)} of {len(rows)} families are cut at three places or more.", file=sys.stderr)


if __name__ == "__main__":
    main()
