"""`lightning-stitch inspect SOURCE`: cuts, costs and licence of a source, before anything is trained."""

from __future__ import annotations

import dataclasses
from json import dumps
from typing import TYPE_CHECKING, Any

from lightning_stitch.tables import print_table

if TYPE_CHECKING:
    from lightning_stitch.cutting import Cut
    from lightning_stitch.sources import Source

_WAYS = {"symbolic": "symbolically, for any input size", "example": "by example, for this input size"}


def inspect(source: str, granularity: str = "blocks", pretrained: bool = True, json: bool = False) -> None:
    """List where a network can be cut: formats, shapes and costs; its licence and preprocessing.

    Args:
        source: A model name of timm's, hf-hub:ORG/NAME[@REVISION], local-dir:PATH, torchvision:NAME or
            python:MODULE:FACTORY.
        granularity: stages, blocks, reference or all.
        pretrained: Whether its weights are fetched; false makes random ones, without a download.
        json: Print JSON.

    Raises:
        SourceError: If the source cannot be had.
        CutError: If it cannot be cut.
    """
    from lightning_stitch.sources import load_source

    report = describe_source(load_source(source, pretrained=pretrained), granularity=granularity)
    if json:
        print(dumps(report, indent=2))
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
    size, difference = "x".join(map(str, report["input_size"])), report["train_mode_difference"]
    facts = {
        "licence": report["licence"] or "unknown",
        "revision": report["revision"] or "unknown",
        "weights": report["weight_hash"],
        "input": f"{size}{' only' if report['fixed_size'] else ''}, mean {report['mean']}, std {report['std']}",
        "cost": f"{report['params'] / 1e6:.3f} M parameters, {report['macs'] / 1e6:.1f} M MACs, "
        f"{report['activation_bytes'] / 1e6:.3g} MB of activations",
        "uncounted": ", ".join(report["uncounted"]),
        "traced": _WAYS[report["traced"]],
        "training": difference and f"{difference}; fragments do what eval mode does",
    }
    print(f"{report['name']} ({report['architecture']})")
    for label, fact in facts.items():
        if fact:
            print(f"  {label:<9} {fact}")
    title = f"{len(report['cuts'])} cuts ({report['granularity']})"
    if report["cuts"]:
        print_table([_cells(cut) for cut in report["cuts"]], title=title, left=["format"])
    else:
        print(title)


def _cells(cut: dict[str, Any]) -> dict[str, str]:
    prefix = f" +{cut['prefix_tokens']}" if cut["prefix_tokens"] else ""
    return {
        "cut": cut["name"],
        "format": cut["format"] + prefix,
        "shape": "x".join(map(str, cut["shape"])),
        "stride": "-" if cut["stride"] is None else f"{cut['stride']:g}",
        "M MACs before": f"{cut['macs_before'] / 1e6:.1f}",
        "M params before": f"{cut['params_before'] / 1e6:.3f}",
    }
