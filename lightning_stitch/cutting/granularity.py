"""Which cuts of a network are worth offering: rules on the graph, no list of architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from torch import fx, nn

from lightning_stitch.cutting.tracing import ModuleCall


@dataclass(slots=True)
class _Scope:
    """A module call and the calls made directly inside it."""

    call: ModuleCall
    children: list[_Scope] = field(default_factory=list)


def block_outputs(calls: Sequence[ModuleCall], cuts: Set[fx.Node]) -> set[fx.Node]:
    """Outputs of the trunk's blocks that are cuts.

    A module is trunk where most of its children end in cuts, that is, where it is a chain; the first modules on the
    way down that are not (residual, dense and branching blocks) are blocks. Modules of a class that is a block
    somewhere, and modules as deep in the trunk as their sibling blocks, are blocks too, so that a first block without a
    shortcut is not taken to pieces.
    """
    roots = _scopes(calls)
    classes: set[type[nn.Module]] = set()
    depths: set[tuple[str, int]] = set()
    for scope in roots:
        _find_blocks(scope, cuts, classes, depths)
    outputs: set[fx.Node] = set()
    for scope in roots:
        _collect(scope, cuts, classes, depths, outputs)
    return outputs


def _scopes(calls: Sequence[ModuleCall]) -> list[_Scope]:
    """The calls as trees; a call returns after all that it made."""
    open_scopes: list[_Scope] = []
    for call in calls:
        scope = _Scope(call)
        while open_scopes and open_scopes[-1].call.first >= call.first:
            scope.children.insert(0, open_scopes.pop())
        open_scopes.append(scope)
    # The outermost call is the network itself, which is never a block.
    return [child for scope in open_scopes for child in (scope.children if scope.call.path == "" else [scope])]


def _is_chain(scope: _Scope, cuts: Set[fx.Node]) -> bool:
    inner = [child.call.output in cuts for child in scope.children[:-1]]
    return sum(inner) * 2 >= len(inner)


def _place(call: ModuleCall) -> tuple[str, int]:
    return call.path.split(".")[0], call.path.count(".")


def _find_blocks(
    scope: _Scope, cuts: Set[fx.Node], classes: set[type[nn.Module]], depths: set[tuple[str, int]]
) -> None:
    if scope.call.is_leaf or not scope.children:
        return
    if _is_chain(scope, cuts):
        for child in scope.children:
            _find_blocks(child, cuts, classes, depths)
        return
    depths.add(_place(scope.call))
    if scope.call.module_type not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        classes.add(scope.call.module_type)


def _collect(
    scope: _Scope,
    cuts: Set[fx.Node],
    classes: Set[type[nn.Module]],
    depths: Set[tuple[str, int]],
    outputs: set[fx.Node],
) -> None:
    if scope.call.output is not None and scope.call.output in cuts:
        outputs.add(scope.call.output)
    is_block = scope.call.module_type in classes or _place(scope.call) in depths or not _is_chain(scope, cuts)
    if not (scope.call.is_leaf or is_block):
        for child in scope.children:
            _collect(child, cuts, classes, depths, outputs)


def with_weights_between(
    nodes: Sequence[fx.Node], last: fx.Node, has_weights: Callable[[fx.Node, fx.Node], bool]
) -> list[fx.Node]:
    """Keep the cuts directly before the next weights: norms, activations and pooling go to the fragment before."""
    return [node for node, following in zip(nodes, [*nodes[1:], last], strict=True) if has_weights(node, following)]


def reference_inputs(nodes: Sequence[fx.Node], traced: fx.GraphModule) -> list[fx.Node]:
    """The StitchNet authors' rule: inputs of ungrouped convolutions and linear layers, the first layer excepted.

    A cut that several operations read counts only if all of them are such convolutions.
    """
    layers = {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    weighted = [node for node, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Linear)]
    chosen = []
    for node in nodes:
        readers = [None if user in weighted[:1] else layers.get(user) for user in node.users]
        convolutions = [isinstance(reader, nn.Conv2d) and reader.groups == 1 for reader in readers]
        if all(convolutions) or (len(readers) == 1 and isinstance(readers[0], nn.Linear)):
            chosen.append(node)
    return chosen
