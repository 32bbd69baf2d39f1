"""What a network does in train mode alone, by comparing two traces; its fragments always do what eval mode does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import fx, nn

from lightning_stitch.cutting.random_numbers import RandomNumbers
from lightning_stitch.cutting.tracing import FUNCTIONAL_DROPOUT, Way, is_in_place, trace, tracer_for
from lightning_stitch.errors import CutError


def train_mode_difference(
    network: nn.Module, evaluated: fx.GraphModule, way: Way, input_size: tuple[int, int, int]
) -> str | None:
    """The first operation in which a trace in train mode differs from that in eval mode, in words; None: none does.

    Dropout, drop path, BatchNorm and other modules that are kept whole follow `train()` in fragments, too, and are no
    difference.
    """
    # What only training draws (layer drop, noise) must not move the caller's random numbers.
    state = random.getstate()
    try:
        with RandomNumbers(seed=0):
            trained, _ = trace(network, tracer_for(network, way, input_size), training=True)
    except CutError as error:
        return f"in train mode it {str(error).splitlines()[0].partition(' ')[2]}"
    finally:
        if random.getstate() != state:
            random.setstate(state)
    for (node, operation), (counterpart, operation_trained) in zip_longest(
        _operations(evaluated), _operations(trained), fillvalue=(None, None)
    ):
        if operation != operation_trained:
            trains, evaluates = _describe(counterpart, trained), _describe(node, evaluated)
            return f"{trains} where eval mode has {evaluates if evaluates != trains else 'other arguments'}"
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


def _describe(node: fx.Node | None, traced: fx.GraphModule) -> str:
    if node is None or node.op == "output":
        return "the output"
    if node.op == "call_module":
        return f"{node.target} ({type(traced.get_submodule(str(node.target))).__name__})"
    scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    where = scopes[-1].partition(".")[2] if scopes else ""
    return (str(node.target) if node.op == "get_attr" else node.name) + (f" in {where}" if where else "")
