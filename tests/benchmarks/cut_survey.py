"""Cut the smallest member of every family of timm's and say how it went: CSV on stdout, a summary on stderr.

    python tests/benchmarks/cut_survey.py > survey.csv          # all of timm: about half an hour on one core
    python tests/benchmarks/cut_survey.py resnet swin_transformer vision_transformer      # these families
    python tests/benchmarks/cut_survey.py resnet50 vit_base_patch16_224                   # these models

A family is one module of `timm.list_modules()`. Weights are random, images are of the smallest size of 64, 96, 128, 160
and the native one that the network accepts. "seconds" are for tracing and cutting it at its native size. "difference"
is the largest one between the chain of all fragments and the network itself, relative to the largest output;
"partitioned" tells whether each parameter is in exactly one fragment; families that share weights between blocks have
copies of them in each. "macs" are millions for one image, "macs_ratio" what they are of those that torch's FLOP counter
finds in a real run, "uncounted" the work that neither counts. "stitched" is how many of four joints in mid-network were
fitted, assembled and run: to and from a small CNN and a small ViT; "stitch_error" the largest relative difference
between the assembled network, folds included, and its parts run one after the other.
"""

from __future__ import annotations

import csv
import gc
import math
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch import nn

from lightning_stitch import CalibrationSettings, CutError, CutGraph, Pool, Preprocessing, load_source
from lightning_stitch.progress import Silent

sys.path.append(str(Path(__file__).parents[1]))
from doubles.references import counted_macs

SIZES = (64, 96, 128, 160)
COLUMNS = [
    *("family", "model", "params", "size", "way", "cuts", "blocks", "formats", "seconds", "difference"),
    *("partitioned", "macs", "macs_ratio", "uncounted", "stitched", "stitch_error", "problem"),
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


def as_small_as_possible(graph: CutGraph, network: nn.Module) -> CutGraph:
    """The network's graph at the smallest size that it accepts."""
    native = network.pretrained_cfg["input_size"]
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
        graph = CutGraph(network, tuple(network.pretrained_cfg["input_size"]))
    except CutError as error:
        return {**row, "problem": str(error)}
    seconds = time.perf_counter() - begun
    graph = as_small_as_possible(graph, network)
    cuts = graph.cuts("all")
    names = [None, *(cut.name for cut in graph.cuts("blocks")), None]
    pieces = [graph.fragment(a, b, share=True) for a, b in pairwise(names)]
    owners = Counter(id(p) for a, b in pairwise(names) for p in graph.parameters(a, b))
    macs = graph.macs(None, None)
    ratio = macs / counted_macs(network, graph.input_size)
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
        "macs": f"{macs / 1e6:.1f}",
        "macs_ratio": f"{ratio:.4f}",
        "uncounted": ", ".join(graph.uncounted),
        **stitched(network, graph.input_size[1]),
    }


def stitched(network: nn.Module, size: int) -> dict[str, object]:
    """The columns about joints with the two partners."""
    cfg = network.pretrained_cfg
    preprocessing = Preprocessing(tuple(cfg["input_size"]), cfg["mean"], cfg["std"], fixed_size=cfg["fixed_input_size"])
    source = load_source(network, name="it", preprocessing=preprocessing)
    partners = [load_source(name, pretrained=False) for name in ("test_resnet", "test_vit")]
    pool = Pool([source, *partners], (3, size, size), settings=CalibrationSettings(rows_per_image=16))
    pool.calibrate(torch.rand(4, 3, size, size).split(2))
    middle = {part.name: part.cuts[len(part.cuts) // 2].name for part in pool.parts}
    pairs = [pair for partner in partners for pair in (("it", partner.name), (partner.name, "it"))]
    candidates = [pool.stitch([(a, None, middle[a]), (b, middle[b], None)]) for a, b in pairs]
    images = torch.rand(2, 3, size, size)
    outcomes, _ = pool.outcomes(candidates, [images], progress=Silent())
    errors = []
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        with torch.inference_mode():
            found = pool.assemble(candidate)(images)
        errors.append(((found - outcome.features).norm() / outcome.features.norm()).item())
    return {"stitched": sum(math.isfinite(error) for error in errors), "stitch_error": f"{max(errors):.1e}"}


def main() -> None:
    warnings.simplefilter("ignore")
    writer = csv.DictWriter(sys.stdout, COLUMNS, restval="")
    writer.writeheader()
    rows = []
    for family in sys.argv[1:] or timm.list_modules():
        is_model = family not in timm.list_modules()
        if not is_model and all(
            name.startswith(("test_", "lightning_stitch")) for name in timm.list_models(module=family)
        ):
            continue
        try:
            rows.append(survey(family, family if is_model else smallest_member(family)))
        except Exception as error:  # a survey reports every failure and goes on
            rows.append({"family": family, "problem": f"{type(error).__name__}: {error}"})
        writer.writerow({key: str(value).replace("\n", " ")[:300] for key, value in rows[-1].items()})
        sys.stdout.flush()
        gc.collect()
    cut = [row for row in rows if not row.get("problem") and int(str(row["cuts"])) >= 3]
    print(f"{len(cut)} of {len(rows)} families are cut at three places or more.", file=sys.stderr)
    joints = sum(int(str(row.get("stitched") or 0)) for row in rows)
    print(f"{joints} of {4 * len(rows)} joints with a CNN and a ViT were fitted and run.", file=sys.stderr)


if __name__ == "__main__":
    main()
