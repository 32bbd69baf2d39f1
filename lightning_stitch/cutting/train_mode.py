"""Tell where a network does something else in train mode than in eval mode, which is what its fragments always run."""

from __future__ import annotations

import dis
import inspect
import random
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from lightning_stitch.cutting.tracing import (
    DROPOUT_NAMES,
    FUNCTIONAL_DROPOUT,
    ScopeTracer,
    Way,
    is_in_place,
    trace,
    tracer_for,
)
from lightning_stitch.errors import CutError

# What follows an argument in bytecode, in some version of Python.
_BEHIND_AN_ARGUMENT = frozenset(
    (
        *("LOAD_CONST", "KW_NAMES", "PRECALL", "CALL", "CALL_KW"),
        *("CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_METHOD"),
    )
)


def warn_where_modes_differ(
    network: nn.Module, traced: fx.GraphModule, way: Way, input_size: tuple[int, int, int]
) -> None:
    """Warn if a trace in train mode gives other operations than that in eval mode, or cannot be made.

    Dropout, drop path, BatchNorm and other modules that are kept whole follow `train()` in fragments, too, and are no
    difference. A network of which no part that a trace follows asks for `training` is not traced again.

    Args:
        network: The network. Not changed.
        traced: Its trace in eval mode.
        way: How that was made.
        input_size: (channels, height, width) of the images.
    """
    if not any(map(_asks_for_mode, ScopeTracer().parts_followed(network))):
        return
    # What only training draws (layer drop, noise) must not move the caller's random numbers.
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained, _ = trace(network, tracer_for(network, way, input_size), training=True)
    except CutError as error:
        difference: str | None = f"in train mode it {str(error).splitlines()[0].partition(' ')[2]}"
    else:
        difference = _first_difference(traced, trained)
    finally:
        random.setstate(state)
    if difference is not None:
        warnings.warn(
            f"{type(network).__name__} does something else in train mode than in eval mode: {difference}. Its cuts "
            f"and fragments are those of eval mode, and run it in train mode, too. Let a small module of its own ask "
            f"for `training` (one whose parts have no parts), or register it as a whole with "
            f"timm.layers.register_notrace_module: modules that are kept whole follow train() and eval().",
            stacklevel=3,
        )


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a module's forward, or a method that it names, mentions `training` otherwise than to a dropout."""
    homes = [vars(module), *map(vars, type(module).__mro__)]
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for code in (code for home in homes if name in home for code in _codes(home[name])):
            if "training" in code.co_names and not _tells_dropout_alone(code):
                return True
            names += [other for other in code.co_names if other not in seen]
            seen.update(code.co_names)
    return False


def _tells_dropout_alone(code: CodeType) -> bool:
    """Whether code that mentions `training` only hands it on, as `F.dropout(x, training=self.training)` does."""
    if not DROPOUT_NAMES & set(code.co_names):
        return False
    instructions = list(dis.get_instructions(code))
    told, dropouts = [], 0
    for before, load, after in zip([instructions[0], *instructions], instructions, instructions[1:], strict=False):
        if load.argval == "training":
            told.append(after.opname in _BEHIND_AN_ARGUMENT)
        elif load.argval in DROPOUT_NAMES:
            # Not the module `self.dropout`.
            dropouts += load.opname == "LOAD_GLOBAL" or not before.opname.startswith("LOAD_FAST")
    return all(told) and len(told) <= dropouts


def _codes(attribute: Any) -> Iterator[CodeType]:
    """The code of a function, method or property, and of the functions inside it."""
    function = getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    stack = [code] if isinstance(code, CodeType) else []
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _first_difference(evaluated: fx.GraphModule, trained: fx.GraphModule) -> str | None:
    """The first operation that differs between two traces of a network, in words; None where none does."""
    for (node, operation), (counterpart, other) in zip_longest(
        _operations(evaluated), _operations(trained), fillvalue=(None, None)
    ):
        if operation != other:
            found, expected = _in_words(counterpart, trained), _in_words(node, evaluated)
            return f"{found} where eval mode has {expected if expected != found else 'other arguments'}"
    return None


def _operations(traced: fx.GraphModule) -> Iterator[tuple[fx.Node, Any]]:
    """The nodes that count for the output, and what each does to which others, comparable between graphs."""
    needed: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if node.op == "output" or node in needed or is_in_place(node, traced):
            needed.update((node, *node.all_input_nodes))
    positions: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node in needed:
            named = dict(node.kwargs)
            dropouts = [value for name, value in named.items() if "drop" in name]
            if dropouts and not any(dropouts):
                named.pop("training", None)  # tells a function only whether to drop, and there is nothing to drop
            # Those that stand for functions are numbered by place.
            is_dropout = node.op == "call_module" and str(node.target).startswith(FUNCTIONAL_DROPOUT)
            target = str(traced.get_submodule(str(node.target))) if is_dropout else node.target
            yield node, (node.op, target, fx.map_arg((node.args, named), positions.__getitem__))
            positions[node] = f"node {len(positions)}"


def _in_words(node: fx.Node | None, traced: fx.GraphModule) -> str:
    if node is None or node.op == "output":
        return "the output"
    if node.op == "call_module":
        return f"{node.target} ({type(traced.get_submodule(str(node.target))).__name__})"
    scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    where = scopes[-1].partition(".")[2] if scopes else ""
    return (str(node.target) if node.op == "get_attr" else node.name) + (f" in {where}" if where else "")
