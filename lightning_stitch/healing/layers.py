"""Healing of one layer: which layers can be solved, the rows that they are fed, and the solution.

`lightning_stitch.healing.healing` says what is solved and why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_stitch.stitching import positions

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
MAX_INPUTS = 2304
MAX_ROWS = 4096
ROWS_PER_INPUT = 20

Healable = nn.Linear | nn.Conv2d


# -- which layers ----------------------------------------------------------------------------------------------------


def layers_of(piece: fx.GraphModule) -> tuple[dict[str, Healable], dict[str, str]]:
    """The layers of a piece that have matrices of weights, also those inside of one that runs as a whole (attention).

    Those that healing can solve, by name; and the reason for each of those that it cannot.
    """
    calls = Counter(str(node.target) for node in piece.graph.nodes if node.op == "call_module")
    healable, unsolvable = {}, {}
    for node in piece.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            weight = attrgetter(target)(piece)
            if isinstance(weight, nn.Parameter) and weight.squeeze().ndim > 1:
                unsolvable[target] = "no layer"
        elif node.op == "call_module":
            whole = piece.get_submodule(target)
            has_more_inputs = len(node.all_input_nodes) > 1 or not node.args or not isinstance(node.args[0], fx.Node)
            for name, layer in whole.named_modules(prefix=target):
                reason = _objection(layer)
                if calls[target] > 1:
                    reason = f"called {calls[target]} times"
                elif layer is not whole and (has_more_inputs or whole._forward_hooks or whole._forward_pre_hooks):
                    reason = f"inside of a {type(whole).__name__} of several inputs or with hooks"
                if reason is None:
                    assert isinstance(layer, nn.Linear | nn.Conv2d)
                    healable[name] = layer
                elif any(weight.ndim > 1 for weight in layer.parameters(recurse=False)):
                    unsolvable[name] = reason
    return healable, unsolvable


def _objection(layer: nn.Module) -> str | None:
    # Subclasses pad or standardise on the fly, and hooks change what goes through, so only known classes are solved.
    if type(layer) not in (nn.Linear, nn.Conv2d, Conv2dSame):
        return f"a {type(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return "is not padded with zeros"
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    inputs = weight_of(layer).shape[2]
    return f"{inputs} inputs, more than {MAX_INPUTS}" if inputs > MAX_INPUTS else None


def norm_behind(piece: fx.GraphModule, name: str) -> str | None:
    """The BatchNorm that alone reads what a layer gives."""
    called = [node for node in piece.graph.nodes if node.op == "call_module"]
    readers = [reader for node in called if node.target == name for reader in node.users]
    if len(readers) != 1 or readers[0] not in called:
        return None
    target = str(readers[0].target)
    norm = piece.get_submodule(target)
    known = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return target if known and sum(str(node.target) == target for node in called) == 1 else None


def weight_of(layer: Healable) -> Tensor:
    """A layer's weight as groups x outputs x inputs."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which positions of each of the calibration images are looked at."""

    num_images: int
    seed: int

    def rows(self, layer: Healable, x: Tensor, *, first_image: int) -> Tensor:
        """What a layer is fed at the sampled positions, images x rows x groups x inputs of a group.

        A convolution's row is the patch that it sees. `first_image` says which of the calibration images x begins with.
        """
        if isinstance(layer, nn.Linear):
            return self._sampled(layer, x, first_image)
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        if isinstance(layer, Conv2dSame):
            x = pad_same(x, list(kernel), list(stride), list(dilation))
        else:
            x = functional.pad(x, layer._reversed_padding_repeated_twice)
        height = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        patches = functional.unfold(x, kernel, dilation, 0, stride)
        return self._sampled(layer, patches.unflatten(2, (height, -1)), first_image)

    def outputs(self, layer: Healable, y: Tensor, *, first_image: int) -> Tensor:
        """What a layer gives there, images x rows x groups x outputs of a group."""
        # A copy, or the whole activation would wait in memory with it.
        return self._sampled(layer, y, first_image).clone()

    def _sampled(self, layer: Healable, x: Tensor, first_image: int) -> Tensor:
        """As many positions as the layer's inputs need, of all images at most `MAX_ROWS`, but at least one of each."""
        if isinstance(layer, nn.Linear):
            groups, tokens = 1, x.reshape(len(x), -1, x.shape[-1])
            grid = (1, tokens.shape[1])
        else:
            groups, tokens, grid = layer.groups, x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
        rows = min(MAX_ROWS, ROWS_PER_INPUT * weight_of(layer).shape[2])
        images = range(first_image, first_image + len(x))
        sampled = positions(grid, images, max(1, math.ceil(rows / self.num_images)), self.seed)
        if sampled is not None:
            tokens = tokens.gather(1, sampled.to(x.device)[:, :, None].expand(-1, -1, tokens.shape[2]))
        return tokens.reshape(*tokens.shape[:2], groups, -1)


# -- solving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Solved:
    """The change of one layer: its new weight, and what its output is moved by where there is a bias to take it."""

    strength: float | None  # None: the layer stays as it is
    weight: Tensor | None = field(default=None, repr=False)
    shift: Tensor | None = field(default=None, repr=False)


def solve_layer(
    layer: Healable, x: Tensor, y: Tensor, *, num_fitted: int, has_bias: bool, strengths: Sequence[float] = STRENGTHS
) -> Solved:
    """The change that explains what the layer should give best on rows held out of the fit.

    It is fed `x` (rows x groups x inputs) and should make `y` of it (rows x groups x outputs). The first `num_fitted`
    rows are fitted; `has_bias` says whether a change of the mean has a place.
    """
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    weight = weight_of(layer).to(x.dtype)
    wrong = y - x @ weight.mT
    if layer.bias is not None:
        wrong -= layer.bias.detach().view(len(weight), 1, -1).to(x.dtype)
    fitted, target, unseen = x[:, :num_fitted], wrong[:, :num_fitted], wrong[:, num_fitted:]
    before = least = float(unseen.square().sum(dtype=torch.float64))
    if not before > 0:
        return Solved(None)
    mean_x, mean_d = fitted.mean(1, keepdim=True), target.mean(1, keepdim=True)
    if not has_bias:
        mean_x, mean_d = torch.zeros_like(mean_x), torch.zeros_like(mean_d)
    fitted, held_out, unseen = fitted - mean_x, x[:, num_fitted:] - mean_x, unseen - mean_d
    wide = fitted.shape[1] < fitted.shape[2]
    gram = (fitted @ fitted.mT if wide else fitted.mT @ fitted).double()
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] / fitted.shape[2]
    right = (target - mean_d if wide else fitted.mT @ (target - mean_d)).double()
    # Prediction of the held-out rows from the solution, so that only the change that is taken is ever multiplied out.
    seen = held_out @ fitted.mT if wide else held_out
    best: tuple[float, Tensor] | None = None
    for strength in sorted(strengths, reverse=True):
        system = gram.clone()
        # A group that is fed nothing but one value has nothing to change by.
        system.diagonal(dim1=-2, dim2=-1).add_((strength * scale[:, :, 0]).clamp(min=1e-30))
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(system)).to(x.dtype)
        left = float((unseen - seen @ solution).square().sum(dtype=torch.float64))
        if left < least:
            least, best = left, (strength, solution)
        elif best is not None:
            # From the strongest on, the error falls and then rises.
            break
    if best is None:
        return Solved(None)
    change = fitted.mT @ best[1] if wide else best[1]
    shift = (mean_d - mean_x @ change).flatten() if has_bias else None
    new = (weight + change.mT).reshape(layer.weight.shape).to(layer.weight.dtype)
    return Solved(best[0], new, shift)
