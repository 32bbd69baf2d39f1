"""Fold a stitch's affine map into the layer before or behind it, where that is exact, and say what it costs where.

Into the consumer: a linear layer, or a dense convolution that is not padded with zeros (or any dense convolution when
the stitch has no bias). Into the producer: a dense convolution or linear layer, with or without an eval-mode BatchNorm,
that ends the fragment. Elsewhere the stitch stays a layer of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, fx, nn

from lightning_stitch.errors import CutError
from lightning_stitch.recipe import Placement, StitchSpec
from lightning_stitch.stitching.stitches import Stitch

PLACES: tuple[Placement, ...] = ("consumer", "explicit", "producer")
"""Where a stitch may lie; of equal costs the first is taken."""

Array = numpy.ndarray[Any, Any]
Numbers = int | Array


def consumer_layers(fragment: fx.GraphModule, *, bias: bool) -> list[nn.Conv2d | nn.Linear] | None:
    """The layers at a fragment's entry that could take a stitch in; None where folding would not be exact.

    Every reader of the input must be a dense convolution or a linear layer used once. A stitch with a bias does not go
    into a convolution with zero padding: the border sees zeros, not the bias.
    """
    entry = next(node for node in fragment.graph.nodes if node.op == "placeholder")
    readers = list(entry.users)
    layers = [_dense_layer(fragment, node) for node in readers]
    for reader, layer in zip(readers, layers, strict=True):
        if layer is None or not _is_called_once(fragment, reader):
            return None
        if bias and isinstance(layer, nn.Conv2d) and any(_padding(layer)) and layer.padding_mode == "zeros":
            return None
    return [layer for layer in layers if layer is not None] or None


def producer_layers(fragment: fx.GraphModule) -> tuple[nn.Conv2d | nn.Linear, nn.BatchNorm2d | None] | None:
    """The layer at a fragment's end, and the BatchNorm behind it, that could take a stitch in; None where not exact."""
    node = _through_identities(fragment, next(n for n in fragment.graph.nodes if n.op == "output").all_input_nodes[0])
    norm = None
    module = _module(fragment, node)
    if isinstance(module, nn.BatchNorm2d) and _is_affine_in_eval(module) and len(node.args) == 1:
        if not _is_used_once(fragment, node):
            return None
        norm = module
        node = _through_identities(fragment, node.all_input_nodes[0])
    layer = _dense_layer(fragment, node)
    return None if layer is None or not _is_used_once(fragment, node) else (layer, norm)


def fold_into_consumer(fragment: fx.GraphModule, stitch: Stitch) -> None:
    """Give the fragment, in place, first layers that take the sender's channels.

    W'[o, :, k, l] = W[o, :, k, l] A and b' = b + sum over k, l of W[., ., k, l] a. The layers are new ones: those that
    were there may be another fragment's, too, and stay as they are. A CutError says that it would not be exact here.
    """
    weight, bias = _numbers(stitch)
    layers = consumer_layers(fragment, bias=bias is not None)
    if layers is None:
        raise CutError(
            "This stitch cannot be folded into the fragment behind it: not all its readers are dense layers."
        )
    for layer in (_replace_by_copy(fragment, layer) for layer in layers):
        old = layer.weight.detach().double()
        if isinstance(layer, nn.Conv2d):
            new = torch.einsum("oikl,ic->ockl", old, weight)
            shift = None if bias is None else torch.einsum("oikl,i->o", old, bias)
            layer.in_channels = new.shape[1]
        else:
            new = old @ weight
            shift = None if bias is None else old @ bias
            layer.in_features = new.shape[1]
        _set(layer, new, shift if layer.bias is None or shift is None else shift + layer.bias.detach().double())


def fold_into_producer(fragment: fx.GraphModule, stitch: Stitch) -> None:
    """Give the fragment, in place, a last layer that yields the receiver's channels; its BatchNorm goes.

    W' = A W and b' = A b + a, after the BatchNorm's running statistics are folded into W and b. The layer is a new one:
    that which was there, and the BatchNorm, may be another fragment's, too, and stay as they are. A CutError says that
    it would not be exact here.
    """
    weight, bias = _numbers(stitch)
    layers = producer_layers(fragment)
    if layers is None:
        raise CutError("This stitch cannot be folded into the fragment before it: it does not end in a dense layer.")
    layer, norm = _replace_by_copy(fragment, layers[0]), layers[1]
    old = layer.weight.detach().double()
    shift = torch.zeros(old.shape[0], dtype=old.dtype, device=old.device)
    if layer.bias is not None:
        shift = layer.bias.detach().double()
    if norm is not None:
        scale, offset = _batch_norm_as_affine(norm)
        old = old * scale.view(-1, *[1] * (old.ndim - 1))
        shift = shift * scale + offset
        _remove(fragment, norm)
    new = torch.einsum("po,o...->p...", weight, old)
    shift = weight @ shift if bias is None else weight @ shift + bias
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = new.shape[0]
    else:
        layer.out_features = new.shape[0]
    _set(layer, new, shift)


class Leaving(NamedTuple):
    """What the cost of stitches depends on at the cut that they leave.

    Attributes:
        channels: Of the cut.
        positions: Of its grid; 1 for a vector.
        prefix_tokens: Before the grid's.
        foldable: Whether a stitch may go into the last layer of the piece before the cut (`fold_into_producer`).
        per_channel: Weights of that layer for each channel that it gives.
        lost: Parameters that the fold does away with: the layer's bias, and the BatchNorm behind it.
    """

    channels: int
    positions: int
    prefix_tokens: int
    foldable: bool
    per_channel: int
    lost: int

    @classmethod
    def of(cls, before: fx.GraphModule, channels: int, size: tuple[int, int] | None, prefix_tokens: int) -> Leaving:
        """At the end of a piece, which gives an activation of such channels, grid and prefix tokens."""
        producer, positions = producer_layers(before), 1 if size is None else size[0] * size[1]
        if producer is None:
            return cls(channels, positions, prefix_tokens, False, 0, 0)
        layer, norm = producer
        lost = (channels if layer.bias is not None else 0) + (2 * channels if norm is not None and norm.affine else 0)
        return cls(channels, positions, prefix_tokens, True, layer.weight[0].numel(), lost)


class Entering(NamedTuple):
    """The same at the cut that they lead to: numbers, or arrays of several such cuts.

    Attributes:
        channels: Of the cut.
        positions: Of its grid; 0 for a vector.
        prefix_tokens: Before the grid's.
        foldable: Whether a stitch may go into the first layers of the piece behind the cut (`fold_into_consumer`).
        per_channel: Weights of these layers for each channel that they take.
        macs_per_channel: Their multiply-accumulates for each channel that they take.
        biases: Parameters that the fold adds: biases of layers that have none.
    """

    channels: Numbers
    positions: Numbers
    prefix_tokens: Numbers
    foldable: Numbers
    per_channel: Numbers
    macs_per_channel: Numbers
    biases: Numbers

    @classmethod
    def of(
        cls, after: fx.GraphModule, channels: int, size: tuple[int, int] | None, prefix_tokens: int, *, bias: bool
    ) -> Entering:
        """At the entry of a piece, for stitches with a bias or without; a fold's layers work on the cut's grid."""
        layers = consumer_layers(after, bias=bias) or []
        per_channel = macs = biases = 0
        positions = 0 if size is None else size[0] * size[1]
        for layer in layers:
            steps = 1 if size is None else positions + prefix_tokens
            if isinstance(layer, nn.Conv2d) and size is not None:
                steps = _output_steps(layer, size)
            per_channel += layer.weight[:, 0].numel()
            macs += layer.weight[:, 0].numel() * steps
            biases += layer.weight.shape[0] if bias and layer.bias is None else 0
        return cls(channels, positions, prefix_tokens, bool(layers), per_channel, macs, biases)

    @classmethod
    def stack(cls, cuts: Iterable[Entering]) -> Entering:
        """Several in one, as arrays."""
        columns = [numpy.array(column) for column in zip(*cuts, strict=True)]
        return cls(*(column if column.dtype == bool else column.astype(numpy.int64) for column in columns))


def stitch_costs(leaving: Leaving, entering: Entering, *, bias: bool) -> tuple[Array, Array, Array]:
    """What stitches add to their fragments at each place, in the order of `PLACES`; folds can make it negative.

    Gives parameters, multiply-accumulates for an image, and whether that place is exact, each places (x cuts).
    """
    sends, takes = leaving.channels, entering.channels
    carries = (leaving.prefix_tokens == entering.prefix_tokens) & (numpy.asarray(entering.prefix_tokens) > 0)
    steps = numpy.where(entering.positions == 0, 1, numpy.minimum(leaving.positions, entering.positions))
    steps = steps + leaving.prefix_tokens * carries
    steps_before = leaving.positions + leaving.prefix_tokens
    params = [
        (sends - takes) * entering.per_channel + entering.biases,
        sends * takes + takes * bias,
        (takes - sends) * leaving.per_channel + takes - leaving.lost,
    ]
    macs = [
        (sends - takes) * entering.macs_per_channel,
        sends * takes * steps,
        (takes - sends) * leaving.per_channel * steps_before,
    ]
    takes_all = carries | (numpy.asarray(entering.prefix_tokens) == 0)
    exact = numpy.broadcast_arrays(takes_all & entering.foldable, True, leaving.foldable)
    return numpy.stack(numpy.broadcast_arrays(*params)), numpy.stack(numpy.broadcast_arrays(*macs)), numpy.stack(exact)


def cheapest_places(
    leaving: Leaving, entering: Entering, *, bias: bool, before_taken: bool
) -> tuple[Array, Array, Array]:
    """Where stitches cost the fewest multiply-accumulates, as places in `PLACES`; their parameters and these.

    With `before_taken` the layer before already holds the stitch before it, which it can do only once.
    """
    params, macs, exact = stitch_costs(leaving, entering, bias=bias)
    exact[PLACES.index("producer")] &= not before_taken
    places = numpy.where(exact, macs, numpy.iinfo(macs.dtype).max).argmin(0)[None]
    return places[0], numpy.take_along_axis(params, places, 0)[0], numpy.take_along_axis(macs, places, 0)[0]


def stitch_cost(
    spec: StitchSpec, before: fx.GraphModule, after: fx.GraphModule, placement: Placement
) -> tuple[int, int]:
    """(parameters, multiply-accumulates for an image) that one stitch adds to the pieces before and behind it."""
    leaving = Leaving.of(before, spec.in_channels, spec.in_size, spec.in_prefix_tokens)
    entering = Entering.of(after, spec.out_channels, spec.out_size, spec.out_prefix_tokens, bias=spec.bias)
    params, macs, exact = stitch_costs(leaving, entering, bias=spec.bias)
    place = PLACES.index(placement)
    assert exact[place]
    return int(params[place]), int(macs[place])


def _output_steps(layer: nn.Conv2d, size: tuple[int, int]) -> int:
    steps = 1
    for side, padding, dilation, kernel, stride in zip(
        size, _padding(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
    ):
        steps *= (side + padding - dilation * (kernel - 1) - 1) // stride + 1
    return steps


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Steps by which padding makes the map higher and wider; "same" pads an even kernel on one end only."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return tuple(2 * int(p) for p in layer.padding)


def _numbers(stitch: Stitch) -> tuple[Tensor, Tensor | None]:
    assert stitch.weight is not None
    return stitch.weight.detach().double(), None if stitch.bias is None else stitch.bias.detach().double()


def _replace_by_copy(fragment: fx.GraphModule, layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Put a copy in a layer's place, and give the copy."""
    layer_copy = copy.deepcopy(layer)
    name = next(str(node.target) for node in fragment.graph.nodes if _module(fragment, node) is layer)
    fragment.add_submodule(name, layer_copy)
    return layer_copy


def _set(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=layer.weight.requires_grad)


def _module(fragment: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return fragment.get_submodule(str(node.target)) if node.op == "call_module" else None


def _dense_layer(fragment: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    module = _module(fragment, node)
    # Subclasses pad or standardise on the fly, hooks change what goes through or (older weight and spectral norms) the
    # weight itself, so only the plain classes without hooks are sure to be affine.
    if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
        return None if _has_hooks(module) else module
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_called_once(fragment: fx.GraphModule, node: fx.Node) -> bool:
    return sum(call.op == "call_module" and call.target == node.target for call in fragment.graph.nodes) == 1


def _is_used_once(fragment: fx.GraphModule, node: fx.Node) -> bool:
    return len(node.users) == 1 and _is_called_once(fragment, node)


def _through_identities(fragment: fx.GraphModule, node: fx.Node) -> fx.Node:
    while len(node.users) == 1:
        module = _module(fragment, node)
        if not isinstance(module, nn.Identity | nn.Dropout) or _has_hooks(module):
            break
        node = node.all_input_nodes[0]
    return node


def _is_affine_in_eval(norm: nn.BatchNorm2d) -> bool:
    """A BatchNorm with running statistics, without hooks or an activation (timm's BatchNormAct2d may carry one)."""
    extras = [getattr(norm, name) for name in ("act", "drop") if hasattr(norm, name)]
    plain = not _has_hooks(norm) and all(isinstance(extra, nn.Identity) for extra in extras)
    return norm.running_mean is not None and plain


def _batch_norm_as_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    offset = -norm.running_mean.detach().double() * scale
    return scale, offset + norm.bias.detach().double() if norm.affine else offset


def _remove(fragment: fx.GraphModule, norm: nn.Module) -> None:
    for node in list(fragment.graph.nodes):
        if _module(fragment, node) is norm:
            node.replace_all_uses_with(node.args[0])
            fragment.graph.erase_node(node)
            fragment.delete_submodule(str(node.target))
    fragment.recompile()
