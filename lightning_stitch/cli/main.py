"""`lightning-stitch COMMAND ...`: which command is meant, and how errors are told.

A command that takes a configuration is a method of `StitchTrainer`; every other one is a function whose signature is
its parser (`lightning_stitch.cli.parsers`). Whatever is slow to import, each command imports when it runs, so that
`--help`, `--version` and a misspelt command are answered at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning_stitch import __version__
from lightning_stitch.cli.app import app
from lightning_stitch.cli.compose import compose
from lightning_stitch.cli.export import export
from lightning_stitch.cli.init import init
from lightning_stitch.cli.inspect import inspect
from lightning_stitch.cli.predict import predict
from lightning_stitch.cli.publish import publish
from lightning_stitch.cli.report import report
from lightning_stitch.errors import StitchError, nearest

_COMMANDS = (compose, init, inspect, predict, report, export, publish, app)
FUNCTIONS: dict[str, Callable[..., None]] = {function.__name__: function for function in _COMMANDS}
CONFIGURED = {
    "fit": "Search, compose and train as a configuration says (--config FILE).",
    "validate": "Evaluate a checkpoint on the validation images of a configuration.",
    "test": "Evaluate a checkpoint on the test images of a configuration.",
    "predict_data": "Predict with a module, a data module and callbacks of a configuration.",
    "check": "Check the sources of a configuration's search before anything is downloaded.",
    "compare": "Compare a StitchNet with linear probing and fine-tuning, by a configuration.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error of this library's is printed without a traceback and exits with 1."""
    try:
        with _without_advertisements():
            _run(list(sys.argv[1:] if argv is None else argv), from_process=argv is None)
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


@contextmanager
def _without_advertisements() -> Iterator[None]:
    """Lightning's tips for other products, and what its releases warn of one another, say nothing of a run."""
    places = ("utilities.rank_zero", "trainer.connectors.checkpoint_connector")
    packages = ("pytorch_lightning", "lightning.pytorch")
    loggers = [logging.getLogger(f"{package}.{place}") for package in packages for place in places]

    def says_something(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("💡 Tip", "`weights_only` was not set"))

    for logger in loggers:
        logger.addFilter(says_something)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(says_something)


def _run(arguments: list[str], *, from_process: bool) -> None:
    try:
        from lightning_stitch.cli.parsers import PROGRAM, overview, parser_of, summary_of
    except ModuleNotFoundError as error:
        raise StitchError("The command line needs jsonargparse: pip install 'lightning-stitch[cli]'") from error

    command = arguments[0] if arguments else "--help"
    if command in FUNCTIONS:
        parser = parser_of(FUNCTIONS[command])
        FUNCTIONS[command](**vars(parser.parse_args(arguments[1:])))
    elif command in CONFIGURED or (command.startswith("--config") and CONFIGURED.keys() & set(arguments)):
        from lightning_stitch.cli.trainer import run_configured

        if {"-h", "--help"} & set(arguments):
            from lightning_stitch.cli.options_page import options_page

            print(options_page(command))
        # LightningCLI warns where it is handed what stands on the command line anyway.
        run_configured(None if from_process else arguments)
    elif command.startswith("-"):
        summaries = {name: summary_of(function) for name, function in FUNCTIONS.items()}
        overview(CONFIGURED | summaries, __version__).parse_args([command])
    else:
        closest = nearest(command, [*CONFIGURED, *FUNCTIONS])
        raise StitchError(f"There is no command {command!r}. Nearest: {closest}. {PROGRAM} --help lists all.")


def _expected(error: BaseException | None) -> StitchError | None:
    """This library's error behind another one: the parser wraps what a class raises when it is built."""
    while error is not None and not isinstance(error, StitchError):
        error = error.__cause__
    return error
