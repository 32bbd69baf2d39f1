"""What a configuration is refused for, in one sentence: where, what was wrong, and the nearest that would do.

jsonargparse says it in some sixty lines: the usage, then every type that a value might have been and why it is none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable
from importlib import import_module
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_stitch._lightning import NAMESPACE
from lightning_stitch.errors import nearest

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser
else:
    LightningArgumentParser = import_module(f"{NAMESPACE}.cli").LightningArgumentParser

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_BETWEEN = re.compile(r"Does not validate against any|Errors:|Subtypes: |$")
_NO_CLASS = re.compile(r"No module named|No \S+ attribute|module .* has no attribute|Expected a dot import path string")
_ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_VALUE = re.compile(r"Expected an? (.+)\. Got value: (.*)")


class OneSentenceParser(LightningArgumentParser):
    """Lightning's parser, whose errors are a sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what was wrong and exit with 2; a parser of a class's options leaves that to the one around it."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {say_once(message, parser.get_defaults().keys())}\n")


def say_once(message: str, options: Iterable[str]) -> str:
    """A message of jsonargparse's as a sentence; one of a form that is not known here stays as it is.

    Args:
        message: Lines, each of which is the reason for one above it that is indented less.
        options: All options of the command, sections and names joined by dots.
    """
    if (unknown := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message)) is not None:
        return _say_unknown(unknown[1], list(options))
    lines = message.splitlines() if "Parser key" in message else []
    # Where one of several types is a class and a class is given, that one is meant: the way goes from class to class.
    owner, start, depth = "", 0, -1
    for number, line in enumerate(lines):
        if (problem := _CLASS.search(line)) is not None:
            if problem.start() <= depth:
                break
            owner, start, depth = problem[1], number + 1, problem.start()
    for number, line in enumerate(lines[start:], start):
        reason = _KEY.sub("", line).strip(" -")
        if not _BETWEEN.match(reason):
            keys = [key[1] for key in map(_KEY.search, lines[: number + 1]) if key]
            return f"{'.'.join(keys)}: {_say_reason(reason, lines[start:], owner)}"
    return " ".join(message.split())


def _say_unknown(option: str, options: list[str]) -> str:
    """That a command has no such option, or not even its section."""
    section = option.partition(".")[0]
    sections = sorted({name.partition(".")[0] for name in options})
    wrong, known = (option, options) if section in sections else (section, sections)
    return f"there is no option {wrong!r}. Nearest: {nearest(wrong, known)}."


def _say_reason(reason: str, lines: list[str], owner: str) -> str:
    if (option := re.match(r"Option '(.+)' is not accepted", reason)) is not None:
        package, _, name = owner.rpartition(".")
        parameters = signature(getattr(import_module(package), name)).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind not in _ANY]
        return f"{owner} has no option {option[1]!r}." + _offer(option[1], names)
    if _NO_CLASS.match(reason):
        path = owner or reason.rpartition(": ")[2]
        package, _, name = path.rpartition(".")
        known = import_module(package).__all__ if package == "lightning_stitch" else []
        return f"there is no class {path!r}." + _offer(name, known)
    if (single := _VALUE.match(reason)) is not None:
        return f"expected {_name_types(single[1])}; found {single[2]!r}."
    if reason.startswith(("Expected a", "Not a valid subclass")):
        texts = {name: text for name, _, text in (line.strip().partition(": ") for line in reversed(lines))}
        types, value = texts.get("Subtypes", "[]")[1:-1], _read(texts.get("Given value", ""))
        if isinstance(value, dict) and "class_path" in value and (astray := value.keys() - {"class_path", "init_args"}):
            keys = ", ".join(map(repr, sorted(astray)))
            return f"beside class_path there may only be init_args, with the options of the class; found {keys}."
        return f"expected {_name_types(types)}; found {value!r}." if types else f"{reason}; found {value!r}."
    return f"{owner}: {reason}." if owner else f"{reason}."


def _offer(word: str, known: Collection[str]) -> str:
    return f" Nearest: {nearest(word, known)}." if known else ""


def _name_types(types: str) -> str:
    """Types as a configuration has them: by the last part of their names, null for None, a Literal by its words."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    types = re.sub(r"(?:\w+\.)*Literal\[(.*?)\]", r"\1", types)
    return " or ".join(re.split(r", (?![^\[]*\])", types.replace("NoneType", "null")))


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):  # a word, or an object of Python's
        return text
