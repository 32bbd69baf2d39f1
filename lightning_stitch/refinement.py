"""Make a composed network better on the same unlabelled images, and keep it only if that helped.

After composing and before ranking, each network is measured on calibration images that were held out of the change:
R2 of its final features against those that its last source, unmodified, gives of the same images. Where the change does
not raise it the network stays as it was; where it does, the change is made anew on all calibration images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_stitch._copying import with_tensors
from lightning_stitch._spool import Carried
from lightning_stitch.activations import Calibrated
from lightning_stitch.candidates import Candidate, Step
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.layerwise import run_layerwise
from lightning_stitch.regression import r2
from lightning_stitch.segments import chunks

Numbers = Mapping[str, Tensor]
Moments = tuple[Tensor, Tensor]
Change = Callable[[Candidate, Sequence[Calibrated], Sequence[Tensor]], list[Numbers]]
"""Gives each step's new numbers, by name, from the activation that leaves the first step, in portions."""


@torch.no_grad()
def batch_norm_statistics(
    candidate: Candidate, sources: Sequence[Calibrated], portions: Sequence[Tensor]
) -> list[Numbers]:
    """Means and variances of every BatchNorm behind a stitch, estimated anew on these images.

    In forward order, so that each is taken behind those before it, and relative to what the same layer is given in its
    own source on the same images: with a, b the mean and standard deviation there and m, s the layer's own, a' and b'
    in the running network make m' = a' - (a - m) b'/b and s' = s b'/b, so that what the layer gives is distributed as
    in its source, whatever images the source was trained on. (Statistics estimated anew for networks put together:
    Jordan et al. 2022, REPAIR, arXiv 2211.08403.)
    """
    found: list[Numbers] = [{}]
    num_images = sum(map(len, portions))
    for step in candidate.steps[1:]:
        numbers: dict[str, Tensor] = {}
        source = sources[step.source]
        portions = [_entered(x, step) for x in portions]
        owns, _ = _divided(source.activations[step.first - 1], len(source.features) - num_images)
        for index in range(step.first, step.last):
            piece = source.parts.pieces[index]
            buffers = _batch_norms(piece)
            variant = with_tensors(piece, buffers)
            seen: dict[str, Moments] = {}

            def note(name: str, layer: nn.Module, inputs: Sequence[Tensor], seen: dict[str, Moments] = seen) -> None:
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    seen[name] = _moments(inputs)

            def move(
                name: str,
                layer: nn.Module,
                inputs: Sequence[Tensor],
                seen: dict[str, Moments] = seen,
                buffers: dict[str, Tensor] = buffers,
            ) -> None:
                if f"{name}.running_mean" in buffers:
                    _match(layer, seen[name], _moments(inputs))

            owns = run_layerwise(piece, owns, note)
            portions = run_layerwise(variant, portions, move)
            numbers |= {name: variant.get_buffer(name).clone() for name in buffers}
        found.append(numbers)
    return found


CHANGES: dict[str, Change] = {"batch_norm": batch_norm_statistics}


FITS = ("open_loop", "row_weights")


def check_refinements(names: Sequence[str]) -> None:
    """Refuse names that are none.

    Raises:
        StitchError: Naming those that there are.
    """
    known = {*CHANGES, *FITS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise StitchError(f"Unknown refinements {unknown}; choose from {sorted(known)}.")


@torch.inference_mode()
def refined(candidate: Candidate, sources: Sequence[Calibrated], name: str) -> Candidate:
    """The candidate with one change made, or as it is where that does not raise the held-out R2.

    Args:
        candidate: The network; one of a single step, or that ends early, stays as it is.
        sources: The sources with their activations of the calibration images.
        name: Which change, of `CHANGES`.
    """
    if len(candidate.steps) == 1 or candidate.pool is not None:
        return candidate
    first, last = candidate.steps[0], candidate.steps[-1]
    num_held_out = len(sources[last.source].features) // 4
    fitted, held_out = _divided(sources[first.source].activations[first.last - 1], num_held_out)
    if not held_out or not fitted:
        return candidate
    wanted = sources[last.source].features[-num_held_out:]

    def held_out_r2(network: Candidate) -> float:
        return r2(torch.cat([x.float() for x in run_on(network, sources, held_out)]), wanted)

    try:
        before = held_out_r2(candidate)
        after = held_out_r2(_with_numbers(candidate, CHANGES[name](candidate, sources, fitted), name))
    except CalibrationError:
        # The features do not vary over the held-out images, or are not finite: there is nothing to go by.
        return candidate
    if not after > before:
        return candidate
    return changed(candidate, sources, name)


@torch.inference_mode()
def changed(candidate: Candidate, sources: Sequence[Calibrated], name: str) -> Candidate:
    """The candidate with one change made on all calibration images, whether it helps or not.

    Args:
        candidate: The network, of more than one step.
        sources: The sources with their activations of the calibration images.
        name: Which change, of `CHANGES`.
    """
    first = candidate.steps[0]
    portions = list(sources[first.source].activations[first.last - 1])
    return _with_numbers(candidate, CHANGES[name](candidate, sources, portions), name)


@torch.no_grad()
def run_on(candidate: Candidate, sources: Sequence[Calibrated], portions: Sequence[Tensor]) -> list[Tensor]:
    """What a candidate gives, from the activation that leaves its first step, in portions."""
    for step in candidate.steps[1:]:
        parts = sources[step.source].parts
        pieces = [with_tensors(piece, step.tensors) for piece in parts.pieces[step.first : step.last]]
        portions = list(chain.from_iterable(chunks(_entered(x, step), parts.images_at_once) for x in portions))
        for piece in pieces:
            portions = [piece(x) for x in portions]
    return list(portions)


def _with_numbers(candidate: Candidate, numbers: Sequence[Numbers], name: str) -> Candidate:
    steps = tuple(
        dataclasses.replace(step, tensors={**step.tensors, **own})
        for step, own in zip(candidate.steps, numbers, strict=True)
    )
    recipe = dataclasses.replace(candidate.recipe, refinements=(*candidate.recipe.refinements, name))
    return dataclasses.replace(candidate, steps=steps, recipe=recipe)


def _entered(x: Tensor, step: Step) -> Tensor:
    return x if step.stitch is None else step.stitch(x)


def _divided(activation: Carried, num_held_out: int) -> tuple[list[Tensor], list[Tensor]]:
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


def _batch_norms(piece: nn.Module) -> dict[str, Tensor]:
    """Copies of the statistics of each BatchNorm that a piece calls once."""
    called = [str(node.target) for node in piece.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    found = {}
    for name in called:
        layer = piece.get_submodule(name)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and called.count(name) == 1:
            for buffer in ("running_mean", "running_var"):
                if getattr(layer, buffer) is not None:
                    found[f"{name}.{buffer}"] = getattr(layer, buffer).clone()
    return found


def _moments(inputs: Sequence[Tensor]) -> Moments:
    """Mean and standard deviation of each channel."""
    count = sum(x.numel() // x.shape[1] for x in inputs)
    others = [dim for dim in range(inputs[0].ndim) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(inputs[0].ndim)]
    mean = torch.stack([x.sum(others, dtype=torch.float64) for x in inputs]).sum(0) / count
    squares = torch.stack([(x - mean.view(shape)).square().sum(others) for x in inputs]).sum(0)
    return mean, (squares / count).sqrt()


def _match(layer: nn.Module, own: Moments, running: Moments) -> None:
    mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    ratio = running[1] / own[1].clamp(min=1e-12)
    ratio = torch.where(own[1] > 1e-6 * own[0].abs(), ratio, 1.0)
    moved = running[0] - (own[0] - mean) * ratio
    mean.copy_(moved)
    variance.copy_(variance * ratio.square())
