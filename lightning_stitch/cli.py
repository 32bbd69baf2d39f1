"""The command line: LightningCLI's commands, `compare` and `inspect` beside them; `predict` and `publish`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_stitch import predict_command, publish_command
from lightning_stitch._lightning import NAMESPACE, mixture, pl
from lightning_stitch.cutting.graph import Cut
from lightning_stitch.errors import StitchError
from lightning_stitch.sources.source import SPECS, Source, load_source
from lightning_stitch.trainer import StitchTrainer

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI
else:
    try:
        import_module("jsonargparse")
    except ModuleNotFoundError as error:
        raise StitchError("The command line needs jsonargparse: pip install 'lightning-stitch[cli]'") from error
    LightningCLI = import_module(f"{NAMESPACE}.cli").LightningCLI

_WAYS = {"symbolic": "symbolically, for any input size", "example": "by example, for this input size"}


class StitchCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, that keeps the result of a run without training.

    With `max_epochs: 0` a Trainer writes no checkpoint, so one is written after fit: `stitched.ckpt` in the log
    directory, which `test`, `predict` and `load_from_checkpoint` take.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `compare` and `inspect`, which take the same configuration."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "compare": own, "inspect": own}

    def after_fit(self) -> None:
        """Save what a search without training made."""
        if self.trainer.max_epochs != 0 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "stitched.ckpt"
        self.trainer.save_checkpoint(path)
        if self.trainer.is_global_zero:
            print(f"The stitched network is in {path}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error of this library's is printed without a traceback and exits with 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["inspect"] and _is_configured(arguments):
        # Both kinds of inspect take --json alone; the parser of configurations wants a value.
        arguments = ["--json=true" if argument == "--json" else argument for argument in arguments]
        sys.argv[1:] = sys.argv[1:] if argv is not None else arguments
    try:
        if arguments[:1] == ["inspect"] and not _is_configured(arguments):
            inspect(arguments[1:])
        elif arguments[:1] == ["publish"]:
            publish_command.publish_checkpoint(arguments[1:])
        elif predict_command.is_meant(arguments):
            predict_command.predict(arguments[1:])
        else:
            if arguments[:1] in (["-h"], ["--help"]):
                print(
                    "lightning-stitch inspect SOURCE ... lists a source's cuts; see lightning-stitch inspect --help.\n"
                    "lightning-stitch inspect --config FILE ... checks the sources of a search before any download.\n"
                    f"{predict_command.USAGE}\n{publish_command.USAGE}\n"
                )
            elif arguments in (["predict", "-h"], ["predict", "--help"]):
                predict_command.parser().print_help()
                print("\nOr, with a model and data of your own:\n")
            StitchCLI(
                pl.LightningModule,
                pl.LightningDataModule,
                trainer_class=StitchTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                # A second run with the same version directory would stop at the first one's saved configuration.
                save_config_kwargs={"overwrite": True},
                # LightningCLI warns where it is handed what stands on the command line anyway.
                args=None if argv is None else arguments,
            )
    except SystemExit as stop:
        # jsonargparse says only that a class is no subclass, by a name that both packages share.
        if stop.code == 2 and (hint := mixture()) is not None:
            print(f"note: {hint}", file=sys.stderr)
        raise
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            raise
        print(f"error: {expected}", file=sys.stderr)
        sys.exit(1)


def _is_configured(arguments: Sequence[str]) -> bool:
    """Whether `inspect` is about the search of a configuration, and not about one source."""
    return any(argument.partition("=")[0] in ("--config", "-c") for argument in arguments)


def _expected(error: BaseException | None) -> StitchError | None:
    """This library's error behind another one: the parser wraps what a class raises when it is built."""
    while error is not None and not isinstance(error, StitchError):
        error = error.__cause__
    return error


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
        "activation_bytes": graph.occupancy(None, None).peak(),
        "uncounted": list(graph.uncounted),
        "traced": graph.way,
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
    size = "x".join(map(str, report["input_size"]))
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


if __name__ == "__main__":
    main()
