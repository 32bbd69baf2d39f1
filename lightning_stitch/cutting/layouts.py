"""How a cut's tensor is laid out, read off the operations around it: dimensions alone do not tell."""

from __future__ import annotations

from torch import fx, nn

from lightning_stitch.recipe import Format

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
)
_CHANNELS_FIRST_NAMES = ("AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "InstanceNorm", "PixelShuffle")
_MOVES_DIMENSIONS = frozenset(
    (
        *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze"),
        *("mean", "sum", "amax", "matmul", "einsum", "getattr", "size"),
    )
)
_TO_CHANNELS_LAST = (0, 2, 3, 1)
_TO_CHANNELS_FIRST = (0, 3, 1, 2)


def layout_of(node: fx.Node, shape: tuple[int, ...], traced: fx.GraphModule) -> Format | None:
    """The format of a node's tensor, of a shape with the batch; None where it is none that a stitch can bridge."""
    if len(shape) == 2:
        return "vector"
    if len(shape) not in (3, 4):
        return None
    # First what reads the tensor, then what made it, then whatever touches tensors of the same layout.
    answers = (_look(node, traced, directions) for directions in ((True,), (False,), (True, False)))
    channels_last = next((answer for answer in answers if answer is not None), None)
    if channels_last is None:
        return None
    if len(shape) == 3:
        return "tokens" if channels_last else None
    return "NHWC" if channels_last else "NCHW"


def _look(node: fx.Node, traced: fx.GraphModule, directions: tuple[bool, ...]) -> bool | None:
    """Walk along tensors of one layout until an operation tells whether channels are last; None where none does.

    Directions are where to walk from each tensor: True to its readers, False to its maker.
    """
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        for forward in directions:
            for operation in current.users if forward else (current,):
                answer = _tells(operation, traced, forward=forward)
                if answer is not None:
                    return answer
                if _moves_dimensions(operation, traced):
                    continue
                for tensor in (operation,) if forward else operation.all_input_nodes:
                    if tensor not in seen and len(seen) < 64:
                        seen.add(tensor)
                        queue.append(tensor)
    return None


def _tells(node: fx.Node, traced: fx.GraphModule, *, forward: bool) -> bool | None:
    if node.op == "call_module":
        return _module_tells(traced.get_submodule(str(node.target)))
    name = getattr(node.target, "__name__", str(node.target))
    dims = _permutation(node)
    if dims in (_TO_CHANNELS_LAST, _TO_CHANNELS_FIRST):
        becomes_last = dims == _TO_CHANNELS_LAST
        return not becomes_last if forward else becomes_last
    if name == "transpose" and set(node.args[1:]) in ({1, 2}, {-1, -2}, {1, -1}, {2, -2}):
        # (batch, channels, positions) <-> (batch, positions, channels); which of the two the other side tells.
        return None
    if name in ("conv2d", "batch_norm", "group_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate"):
        return False
    if name in ("layer_norm", "linear"):
        return True
    if name == "flatten" and forward and node.args[1:] == (2,):
        return False
    if name == "mean" and forward:
        return _mean_tells(node)
    return None


def _mean_tells(node: fx.Node) -> bool | None:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    if dims in ((2, 3), (-2, -1), (-1, -2)):
        return False
    return True if dims in ((1, 2), (1,)) else None


def _module_tells(module: nn.Module) -> bool | None:
    """Whether a module reads and writes channels-last; judged by its first part that cares."""
    for part in module.modules():
        if isinstance(part, _CHANNELS_FIRST) or type(part).__name__.startswith(_CHANNELS_FIRST_NAMES):
            return False
        if isinstance(part, nn.LayerNorm):
            # timm's LayerNorm2d and kin derive from LayerNorm but work on NCHW.
            return not type(part).__name__.endswith("2d")
        if isinstance(part, nn.Linear):
            return True
    return None


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    if node.op not in ("call_method", "call_function") or getattr(node.target, "__name__", node.target) != "permute":
        return None
    dims = node.args[1:] if len(node.args) > 2 else node.args[1] if len(node.args) > 1 else node.kwargs.get("dims", ())
    return tuple(d for d in dims if isinstance(d, int)) if isinstance(dims, list | tuple) else None


def _moves_dimensions(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True for operations behind which the walk would speak of another tensor."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Flatten | nn.Unflatten)
    return getattr(node.target, "__name__", str(node.target)) in _MOVES_DIMENSIONS
