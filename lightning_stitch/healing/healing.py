"""Closed-form healing: re-solve the layers behind a stitch on the same unlabelled images.

Healing goes through the layers behind a stitch in forward order. A layer with weights W (inputs x outputs; of a
convolution: of the patches that it sees) and bias b is given X, rows of what the running network, healed so far, feeds
it on the calibration images, and should give Y, what the same layer gave in its own source on the same images at the
same positions. With D = Y - (X W + b), what it gets wrong, and Xc, Dc the same less their means, the change of the
weights is

    argmin |Xc C - Dc|^2 + l |C|^2  =  (Xc'Xc + l I)^-1 Xc'Dc  =  Xc'(Xc Xc' + l I)^-1 Dc,

the bias changes by what the means leave, mean(D) - mean(X) C, and the network runs on with W + C. Grouped layers
(depthwise ones) have such a small system for each group. Attention and other layers that run as a whole have theirs
inside: q, k, v are solved, then what the healed attention sends on is the X of the output projection.

Why on the change: this is min |X A - Y|^2 + l |A - W|^2, anchored at the weights as they are. What the images do not
determine (directions in which few images do not vary) stays as it was trained; a penalty on the weights themselves
would forget it. Architecture, operations, folds and stitches stay as they are.

A layer's target is its own output, before any BatchNorm behind it, whose statistics stay: estimating them anew lowered
held-out R2. A layer without a bias whose only reader is a BatchNorm moves that one's running mean instead; another one
is solved uncentred.

Chosen, not set: l, relative to the mean diagonal of Xc'Xc, is the one of `STRENGTHS` that explains the layer's output
best on calibration images held out of the fit (whole groups, where groups are given). If none is better than the layer
as it is, it stays. Stitches are fitted anew without the held-out images, too, behind a healed fragment on what that one
sends, with the one of `RIDGES` times the given strength that explains most on these images: a wide stitch that has seen
them leaves nothing to be learnt from them. All of it is undone where the final features do not agree more with those of
the network's last source on the held-out images (`lightning_stitch.healing.healer`). What was fitted without them
stays: fitting once more on all images takes as long again and moves R2 on others by .08 at most.

Cost, for n images: one pass of the source's own fragments behind the stitch, two of the network's, and the solves. A
layer of d inputs per group has `ROWS_PER_INPUT` d rows, all images together at most `MAX_ROWS`, but at least one of
each; more rows changed R2 by .01 at most. Normal equations are solved in float64 by Cholesky, in d or in the rows,
whichever are fewer. In memory are the activations around the layer at hand, its rows, and the sampled outputs of the
layers of its piece.

Where it fails: where little lies behind the stitch there is little to heal, and few images can make it worse (it is
then undone). Under other images than the task's own the strengths chosen mean nothing. Layers of more than `MAX_INPUTS`
inputs per group, called more than once, or of a kind that is no plain linear layer or convolution stay as they are; the
recipe lists them (`Recipe.unhealed`), and `StitchedNetwork.describe` says so.

Kin: layer-wise least squares with the accumulated error accounted for (Zhang et al. 2015, arXiv 1505.06798; He et al.
2017, arXiv 1707.06168), repair of pruned networks on a calibration set (arXiv 2605.21426), and linear maps in the place
of transformer blocks (ReplaceMe, arXiv 2505.02819), which are stitched skips that nothing heals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from lightning_stitch.cutting import with_tensors
from lightning_stitch.healing.layers import Healable, Sampling, layers_of, norm_behind, solve_layer
from lightning_stitch.healing.trials import entered, run_layerwise
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate, Step, fit_stitch

RIDGES = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True, slots=True)
class PieceHealing:
    """What healing did to one piece."""

    tensors: dict[str, Tensor]  # the source's parameters and buffers that have other numbers now
    strengths: dict[str, float | None]  # what was chosen for each layer that could be solved; None: it stays
    unsolvable: dict[str, str]  # the other layers, with the reason
    portions: list[Tensor]  # what the piece gives now
    source_portions: list[Tensor]  # what it gives in its own source


@torch.no_grad()
def heal_piece(
    piece: fx.GraphModule,
    portions: Sequence[Tensor],
    source_portions: Sequence[Tensor],
    *,
    num_held_out: int,
    seed: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
) -> PieceHealing:
    """Heal every layer of a piece, as its source has it, in forward order.

    `portions` are what the running network feeds it, a few images each, `source_portions` what it is fed in its own
    source. The last `num_held_out` images choose the strengths; the others are fitted. `tensors` are the source's
    parameters and buffers, by name, that have other numbers in the running network already.
    """
    sampling = Sampling(sum(map(len, portions)), seed)
    healable, unsolvable = layers_of(piece)
    targets, source_portions = _source_outputs(piece, source_portions, healable, sampling)
    unsolvable |= dict.fromkeys(healable.keys() - targets, "not called exactly once")
    layers = {name: healable[name] for name in targets}  # in the order in which they are called
    norms = {name: norm_behind(piece, name) for name, layer in layers.items() if layer.bias is None}
    copies: dict[str, Tensor] = {
        f"{name}.{part}": x for name, layer in layers.items() for part, x in layer.named_parameters()
    }
    copies |= {f"{norm}.running_mean": piece.get_buffer(f"{norm}.running_mean") for norm in norms.values() if norm}
    variant = with_tensors(piece, {**copies, **(tensors or {})})
    strengths: dict[str, float | None] = {}

    def solve_inside(target: str, inputs: Sequence[Tensor]) -> None:
        for name in [name for name in layers if name == target or name.startswith(f"{target}.")]:
            layer, norm = variant.get_submodule(name), norms.get(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            x = _fed(variant, target, layer, inputs, sampling)
            solved = solve_layer(
                layer,
                x.flatten(0, 1),
                torch.cat(targets.pop(name)).flatten(0, 1),
                num_fitted=(len(x) - num_held_out) * x.shape[1],
                has_bias=layer.bias is not None or norm is not None,
            )
            strengths[name] = solved.strength
            if solved.weight is not None:
                layer.weight.copy_(solved.weight)
            if solved.shift is not None and layer.bias is not None:
                layer.bias.add_(solved.shift.to(layer.bias.dtype))
            elif solved.shift is not None:
                mean = variant.get_buffer(f"{norm}.running_mean")
                mean.sub_(solved.shift.to(mean.dtype))

    outputs = run_layerwise(variant, portions, solve_inside)
    owners = {name for name, strength in strengths.items() if strength is not None}
    owners |= {norm for name, norm in norms.items() if norm and name in owners}
    state = {**dict(variant.named_parameters()), **dict(variant.named_buffers())}
    changed = {name: state[name].detach().clone() for name in copies if name.rpartition(".")[0] in owners}
    return PieceHealing(changed, strengths, unsolvable, outputs, source_portions)


@torch.inference_mode()
def heal(
    candidate: Candidate,
    sources: Sequence[Calibrated],
    settings: CalibrationSettings,
    *,
    ridge: float = 1e-3,
    only_stitches: bool = False,
) -> Candidate:
    """A network with every fragment behind a stitch healed, whether that helped or not; no held-out image is fitted.

    Stitches are fitted anew without those images, with at least the strength `ridge`, on what the healed fragment
    before them sends. With `only_stitches` nothing is healed: what healing is compared with.
    """
    first = candidate.steps[0]
    num_held_out = sources[first.source].num_held_out
    portions = list(sources[first.source].activations[first.last - 1])
    steps = [first]
    unhealed: dict[str, str] = {}
    for step in candidate.steps[1:]:
        source = sources[step.source]
        if step.stitch is not None:
            step = _stitched_anew(step, steps[-1], sources, portions, settings, ridge=ridge)
        portions = entered(portions, step, source)
        source_portions = list(source.activations[step.first - 1])
        tensors: dict[str, Tensor] = {}
        for index in range(step.first, step.last):
            if only_stitches:
                variant = with_tensors(source.parts.pieces[index], step.tensors)
                portions = [variant(x) for x in portions]
                continue
            healed = heal_piece(
                source.parts.pieces[index],
                portions,
                source_portions,
                num_held_out=num_held_out,
                seed=settings.seed,
                tensors=step.tensors,
            )
            tensors |= healed.tensors
            unchanged = {name: "better as it is" for name, strength in healed.strengths.items() if strength is None}
            reasons = {**healed.unsolvable, **unchanged}
            unhealed |= {f"{source.name}: {name}": reason for name, reason in reasons.items()}
            portions, source_portions = healed.portions, healed.source_portions
        steps.append(dataclasses.replace(step, tensors={**step.tensors, **tensors}))
    return candidate.with_steps(steps, **({} if only_stitches else {"healed": True, "unhealed": unhealed}))


def _stitched_anew(
    step: Step,
    before: Step,
    sources: Sequence[Calibrated],
    portions: Sequence[Tensor],
    settings: CalibrationSettings,
    *,
    ridge: float,
) -> Step:
    """The step behind a stitch that is fitted on what the healed network sends."""
    assert step.spec is not None
    stitch = fit_stitch(
        step.spec,
        portions,
        sources[before.source].parts.cuts[before.last - 1],
        sources[step.source],
        settings,
        entry=step.first,
        ridge=[ridge * factor for factor in RIDGES],
        refit=False,
    )
    if stitch is None:
        return step
    spec = dataclasses.replace(stitch.spec, placement=step.spec.placement)
    return dataclasses.replace(step, stitch=stitch, spec=spec)


def _source_outputs(
    piece: fx.GraphModule, portions: Sequence[Tensor], layers: Mapping[str, Healable], sampling: Sampling
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Rows of what each layer gives in the piece's own source, of those called once for each image; and its outputs."""
    rows: dict[str, list[Tensor]] = {}

    def sample(name: str, layer: Healable, inputs: object, outputs: Tensor) -> None:
        sampled = rows.setdefault(name, [])
        sampled.append(sampling.outputs(layer, outputs, first_image=sum(map(len, sampled))))

    handles = [layer.register_forward_hook(partial(sample, name)) for name, layer in layers.items()]
    try:
        outputs = [piece(x) for x in portions]
    finally:
        for handle in handles:
            handle.remove()
    return {name: x for name, x in rows.items() if sum(map(len, x)) == sampling.num_images}, outputs


def _fed(piece: fx.GraphModule, target: str, layer: Healable, inputs: Sequence[Tensor], sampling: Sampling) -> Tensor:
    """Rows of what a layer is fed, which may be inside of the one that the graph calls by the target's name."""
    node = next(node for node in piece.graph.nodes if node.op == "call_module" and node.target == target)
    rows: list[Tensor] = []

    def sample(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(sampling.rows(layer, args[0], first_image=sum(map(len, rows))))

    handle = layer.register_forward_pre_hook(sample)
    for x in inputs:
        piece.get_submodule(target)(x, *node.args[1:], **node.kwargs)
    handle.remove()
    return torch.cat(rows)
