"""The command line: LightningCLI's commands, `compare` and `inspect` beside them; `predict` and `publish`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_stitch._lightning import NAMESPACE, explain_both_loaded, pl
from lightning_stitch.cli import predict as predict_command
from lightning_stitch.cli import publish as publish_command
from lightning_stitch.cli.inspect import inspect
from lightning_stitch.cli.trainer import StitchTrainer
from lightning_stitch.errors import StitchError
from lightning_stitch.training import FragmentSearch

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI
else:
    try:
        import_module("jsonargparse")
    except ModuleNotFoundError as error:
        raise StitchError("The command line needs jsonargparse: pip install 'lightning-stitch[cli]'") from error
    LightningCLI = import_module(f"{NAMESPACE}.cli").LightningCLI


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

    def before_fit(self) -> None:
        """Spare a search whose network a checkpoint replaces; "last" and the like only the Trainer can resolve."""
        path = self.config["fit"].ckpt_path
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FragmentSearch) and path is not None and Path(path).is_file():
                callback.ckpt_path = path

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
        if stop.code == 2 and (hint := explain_both_loaded()) is not None:
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
