"""Public docstrings say which errors there are and of which shapes tensors are."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

import lightning_stitch as ls
from lightning_stitch import errors
from lightning_stitch.errors import StitchError

SHAPE = re.compile(r"\(\w+(, [\w ]+)+\)|\(\w+,\)|\w+ x \w+|0-dim")  # (batch, features), (images,), rows x channels


def errors_raised(function: Callable[..., Any]) -> set[str]:
    """The package's errors that a function raises by itself, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if issubclass(getattr(errors, name, object), StitchError)}


def objections(function: Callable[..., Any], of_class: str = "") -> list[str]:
    """What a docstring, together with that of its class, leaves out."""
    own = inspect.getdoc(function) or ""
    found = [] if own else ["has no docstring"]
    found += [f"does not say when it raises {name}" for name in errors_raised(function) if name not in own + of_class]
    if "Tensor" in str(inspect.signature(function)) and not SHAPE.search(own + of_class):
        found.append("does not say of which shape its tensors are")
    return found


def public_functions() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every public function and method, by name, with the docstring of its class."""
    for name in ls.__all__:
        value = getattr(ls, name)
        if inspect.isfunction(value):
            yield name, value, ""
        elif inspect.isclass(value):
            for method, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if method[0] != "_" and inspect.isfunction(function) and function.__module__.startswith(ls.__name__):
                    yield f"{name}.{method}", function, inspect.getdoc(value) or ""


@pytest.mark.parametrize(("function", "of_class"), [pytest.param(*rest, id=name) for name, *rest in public_functions()])
def test_public_docstrings_say_errors_and_shapes(function: Callable[..., Any], of_class: str) -> None:
    assert not objections(function, of_class)


@pytest.mark.parametrize("name", [name for name in ls.__all__ if inspect.isclass(getattr(ls, name))])
def test_classes_say_what_their_construction_raises(name: str) -> None:
    value = getattr(ls, name)
    doc = inspect.getdoc(value)
    assert doc
    for method in ("__init__", "__post_init__"):
        made = vars(value).get(method)
        if made is not None and made.__code__.co_filename != "<string>":  # as of dataclasses
            assert not [error for error in errors_raised(made) if error not in doc]


def test_what_is_left_out_is_found() -> None:
    def undocumented(x: Tensor) -> Tensor:
        raise StitchError("never")

    def shapeless(x: Tensor) -> Tensor:
        """As it is (unchanged)."""
        return x

    def documented(x: Tensor) -> Tensor:
        """As it is (rows x channels).

        Raises:
            StitchError: Always.
        """
        raise StitchError("never")

    assert len(objections(undocumented)) == 3
    assert objections(shapeless) == ["does not say of which shape its tensors are"]
    assert not objections(documented)
