"""Run a fragment layer by layer, all portions of the calibration images side by side.

A layer can then be changed by what it is really given on all images, before it runs on any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

Visitor = Callable[[str, nn.Module, Sequence[Tensor]], None]


def run_layerwise(
    fragment: fx.GraphModule, portions: Sequence[Tensor], visit: Visitor, *, seen: Visitor | None = None
) -> list[Tensor]:
    """What a fragment gives for each portion; no gradients, no inference mode of its own.

    Args:
        fragment: The fragment, in eval mode.
        portions: Its inputs, a few images each.
        visit: Called with the name, the layer and its inputs, one for each portion, before the layer runs; may change
            the layer's tensors.
        seen: Called with the name, the layer and what it gave, likewise, after it ran.
    """
    runs = [fx.Interpreter(fragment) for _ in portions]
    for run, x in zip(runs, portions, strict=True):
        run.extra_traceback = False
        run.args_iter = iter((x,))
    given: list[Any] = []
    for node in fragment.graph.nodes:
        if node.op == "call_module":
            inputs = [run.fetch_args_kwargs_from_env(node)[0] for run in runs]
            visit(str(node.target), fragment.get_submodule(str(node.target)), [first for first, *_ in inputs])
        given = []
        for run in runs:
            run.env[node] = run.run_node(node)
            given.append(run.env[node])
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]
        if seen is not None and node.op == "call_module":
            seen(str(node.target), fragment.get_submodule(str(node.target)), given)
    return given
