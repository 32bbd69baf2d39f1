"""Run a composed network from its first stitch on, with changes that are on trial, and judge it by held-out R2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from lightning_stitch.cutting import with_tensors
from lightning_stitch.maths import r2
from lightning_stitch.stitching import Calibrated, Candidate, Step, chunks


def divided(activation: Iterable[Tensor], num_held_out: int) -> tuple[list[Tensor], list[Tensor]]:
    """The portions of the images that a change may see, and of the last ones, which it may not."""
    portions = list(activation)
    first_held_out = sum(map(len, portions)) - num_held_out
    fitted, held_out, begun = [], [], 0
    for x in portions:
        before, behind = x.tensor_split([max(0, min(first_held_out - begun, len(x)))])
        fitted += [before] if len(before) else []
        held_out += [behind] if len(behind) else []
        begun += len(x)
    return fitted, held_out


def entered(portions: Iterable[Tensor], step: Step, source: Calibrated) -> list[Tensor]:
    """What a step is fed once its stitch has run, in portions that run fastest."""
    entering = portions if step.stitch is None else (step.stitch(x) for x in portions)
    return list(chain.from_iterable(chunks(x, source.parts.images_at_once) for x in entering))


@torch.no_grad()
def run_on(candidate: Candidate, sources: Sequence[Calibrated], portions: Sequence[Tensor]) -> list[Tensor]:
    """What a candidate gives, from the activation that leaves its first step, in portions."""
    for step in candidate.steps[1:]:
        portions = entered(portions, step, sources[step.source])
        for piece in sources[step.source].parts.pieces[step.first : step.last]:
            variant = with_tensors(piece, step.tensors)
            portions = [variant(x) for x in portions]
    return list(portions)


def held_out_images(candidate: Candidate, sources: Sequence[Calibrated]) -> tuple[list[Tensor], list[Tensor]]:
    """What leaves a candidate's first step, of the images that changes see and of those that judge them."""
    first = candidate.steps[0]
    source = sources[first.source]
    return divided(source.activations[first.last - 1], source.num_held_out)


def held_out_r2(candidate: Candidate, sources: Sequence[Calibrated], held_out: Sequence[Tensor]) -> float:
    """R2 of a candidate's final features against its last source's own, over the held-out images.

    Features that do not vary over them, or are not finite, are a CalibrationError.
    """
    features = torch.cat([x.float() for x in run_on(candidate, sources, held_out)])
    return r2(features, sources[candidate.steps[-1].source].features[-len(features) :])


def run_layerwise(
    fragment: fx.GraphModule,
    portions: Sequence[Tensor],
    visit: Callable[[str, Sequence[Tensor]], None],
) -> list[Tensor]:
    """What a fragment, in eval mode, gives for each portion; no gradients, no inference mode of its own.

    `visit` is called with a layer's name and its inputs, one for each portion, before it runs; it may change tensors.
    """
    runs = [fx.Interpreter(fragment) for _ in portions]
    for run, x in zip(runs, portions, strict=True):
        run.extra_traceback = False
        run.args_iter = iter((x,))
    outputs: list[Any] = []
    for node in fragment.graph.nodes:
        if node.op == "call_module":
            inputs = [run.fetch_args_kwargs_from_env(node)[0] for run in runs]
            visit(str(node.target), [first for first, *_ in inputs])
        outputs = []
        for run in runs:
            run.env[node] = run.run_node(node)
            outputs.append(run.env[node])
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]
    return outputs
