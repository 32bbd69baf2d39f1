"""The options of this package's classes on a page, which `fit --help` shows before Lightning's own."""

from __future__ import annotations

import re
from inspect import Parameter, getdoc, signature
from shutil import get_terminal_size
from textwrap import shorten
from typing import Any

import docstring_parser

from lightning_stitch.cost import Budget
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.training import FragmentSearch, StitchedClassifier

_PLACES = {
    "trainer.callbacks": FragmentSearch,
    "budget of a FragmentSearch": Budget,
    "data": CalibrationDataModule,
    "model": StitchedClassifier,
}
_ONLY_IN_PYTHON = {"train", "val", "test", "datamodule"}
_PAGE = """Options of `lightning-stitch {command} --config FILE`. In FILE a class is named by
class_path, as lightning_stitch.FragmentSearch, and has its options under
init_args. In full (likewise --data.help and --model.help):
    {command} --trainer.callbacks.help lightning_stitch.FragmentSearch
{classes}

What follows are Lightning's.
"""


def options_page(command: str) -> str:
    """Where each class stands in a configuration, and a line for each of its options."""
    classes = (f"\n{place}: {cls.__name__}\n" + "\n".join(_describe(cls)) for place, cls in _PLACES.items())
    return _PAGE.format(command=command, classes="\n".join(classes))


def _describe(cls: type) -> list[str]:
    entries = docstring_parser.parse(getdoc(cls) or "").params
    words = {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}
    width = max(get_terminal_size().columns, 80) - 29
    lines = []
    for name, parameter in signature(cls).parameters.items():
        if name in words and name not in _ONLY_IN_PYTHON:
            option = name if parameter.default is Parameter.empty else f"{name}={_in_yaml(parameter.default)}"
            first_part = re.split(r"[.;](?: |$)", words[name])[0]
            lines.append(
                f"  {option if len(option) <= 26 else name:<26} {shorten(first_part, width, placeholder=' ...')}"
            )
    return lines


def _in_yaml(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else "null" if default is None else str(default)
