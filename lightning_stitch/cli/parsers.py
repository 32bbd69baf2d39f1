"""Parsers from functions: a command's options are its function's parameters, their help is its docstring."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, getdoc, signature
from typing import Any, get_args, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

PROGRAM = "lightning-stitch"


def summary_of(command: Callable[..., None]) -> str:
    """The first line of a command's docstring."""
    return docstring_parser.parse(getdoc(command) or "").short_description or ""


def parser_of(command: Callable[..., None]) -> ArgumentParser:
    """The parser of a command.

    | parameter | on the command line |
    |---|---|
    | without a default | its place |
    | `name: bool = False` | `--name` |
    | `name: list[str]`, also if it may be None | several words in a row |
    | any other | `--name VALUE`, checked against the type hint |

    Args:
        command: A function whose docstring has a line for each of its parameters.
    """
    doc = docstring_parser.parse(getdoc(command) or "")
    words = {parameter.arg_name: parameter.description for parameter in doc.params}
    types = get_type_hints(command)
    description = "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    parser = ArgumentParser(prog=f"{PROGRAM} {command.__name__}", description=description)
    for name, parameter in signature(command).parameters.items():
        options: dict[str, Any] = {"help": words[name]}
        if parameter.default is False:
            options["action"] = "store_true"
        elif list[str] in (types[name], *get_args(types[name])):
            options |= {"type": str, "nargs": "+"}
        else:
            options["type"] = types[name]
        if parameter.default is Parameter.empty:
            parser.add_argument(name, **options)
        else:
            parser.add_argument(f"--{name}", default=parameter.default, **options)
    return parser


def overview(commands: dict[str, str], version: str) -> ArgumentParser:
    """The parser of the program's own options, whose help lists the commands with what they do."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Compose a new network from fragments of pre-trained ones, without back-propagation.",
        version=version,
    )
    subcommands = parser.add_subcommands()
    for name, words in commands.items():
        subcommands.add_subcommand(name, ArgumentParser(), help=words)
    return parser
