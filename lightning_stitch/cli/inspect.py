"""`lightning-stitch inspect`: cuts, costs and licence of sources, before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_stitch._lightning import NAMESPACE
from lightning_stitch.cutting import Cut
from lightning_stitch.errors import StitchError
from lightning_stitch.sources import SPECS, Source, load_source

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI
else:
    try:
        import_module("jsonargparse")
    except ModuleNotFoundError as error:
        raise StitchError("The command line needs jsonargparse: pip install 'lightning-stitch[cli]'") from error
    LightningCLI = import_module(f"{NAMESPACE}.cli").LightningCLI


_WAYS = {"symbolic": "symbolically, for any input size", "example": "by example, for this input size"}


def inspect(arguments: Sequence[str]) -> None:
    """List a source's cuts, their formats, shapes and costs, and its licence and preprocessing.

    Raises:
        SourceError: If the source cannot be had.
        CutError: If it cannot be cut.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-stitch inspect",
        description="List where a network can be cut.",
        epilog="lightning-stitch inspect --config FILE [--json] instead checks all sources of the search in a "
        "configuration of `fit`, before any weights are fetched. It takes the options of `fit`, too.",
    )
    parser.add_argument("source", help=SPECS.replace(", or a live torch.nn.Module", ""))
    parser.add_argument("--granularity", default="blocks", help="stages, blocks (default), reference or all")
    parser.add_argument(
        "--pretrained", default="true", choices=["true", "false"], help="false: random weights, no download"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    source = load_source(options.source, pretrained=options.pretrained == "true")
    report = describe_source(source, granularity=options.granularity)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_source(report)


def describe_source(source: Source, *, granularity: Any = "blocks") -> dict[str, Any]:
    """What `inspect` shows, as plain JSON values; MACs and activations are for one image of the native input size."""
    graph = source.graph
    preprocessing = dataclasses.asdict(source.preprocessing)
    return {
        "name": source.name,
        "source": source.ref.spec,
        "architecture": source.ref.architecture,
        "revision": source.ref.revision,
        "weight_hash": source.ref.weight_hash,
        "licence": source.licence,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()},
        "params": sum(parameter.numel() for parameter in source.module.parameters()),
        "macs": graph.macs(None, None),
        "activation_bytes": graph.activation_bytes(None, None),
        "uncounted": list(graph.uncounted),
        "traced": graph.way,
        "train_mode_difference": graph.train_mode_difference(),
        "granularity": granularity,
        "cuts": [_describe_cut(source, cut) for cut in graph.cuts(granularity)],
    }


def _describe_cut(source: Source, cut: Cut) -> dict[str, Any]:
    params = sum(parameter.numel() for parameter in source.graph.parameters(None, cut.name))
    return {
        "name": cut.name,
        "format": cut.format,
        "shape": list(cut.shape),
        "stride": cut.stride,
        "prefix_tokens": cut.num_prefix_tokens,
        "macs_before": cut.macs,
        "params_before": params,
    }


def _print_source(report: dict[str, Any]) -> None:
    console = Console()
    size, difference = "x".join(map(str, report["input_size"])), report["train_mode_difference"]
    console.print(f"{report['name']} ({report['architecture']})", markup=False, highlight=False)
    for label, value in (
        ("licence", report["licence"] or "unknown"),
        ("revision", report["revision"] or "unknown"),
        ("weights", report["weight_hash"]),
        ("input", f"{size}{' only' if report['fixed_size'] else ''}, mean {report['mean']}, std {report['std']}"),
        (
            "cost",
            f"{report['params'] / 1e6:.3f} M parameters, {report['macs'] / 1e6:.1f} M MACs, "
            f"{report['activation_bytes'] / 1e6:.3g} MB of activations",
        ),
        *([("uncounted", ", ".join(report["uncounted"]))] if report["uncounted"] else []),
        ("traced", _WAYS[report["traced"]]),
        *([("training", f"{difference}; fragments do what eval mode does")] if difference else []),
    ):
        console.print(f"  {label:<9} {value}", markup=False, highlight=False, soft_wrap=True)
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        title=f"{len(report['cuts'])} cuts ({report['granularity']})",
        title_justify="left",
    )
    for column in ("cut", "format", "shape", "stride", "M MACs before", "M params before"):
        table.add_column(column, justify="left" if column in ("cut", "format") else "right")
    for cut in report["cuts"]:
        prefix = f" +{cut['prefix_tokens']}" if cut["prefix_tokens"] else ""
        table.add_row(
            cut["name"],
            cut["format"] + prefix,
            "x".join(map(str, cut["shape"])),
            "-" if cut["stride"] is None else f"{cut['stride']:g}",
            f"{cut['macs_before'] / 1e6:.1f}",
            f"{cut['params_before'] / 1e6:.3f}",
        )
    console.print(table)
