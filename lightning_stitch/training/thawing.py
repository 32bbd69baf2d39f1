"""What of a stitched network trains: which layers, from which epoch on, at which learning rate.

Frozen means that neither parameters nor buffers move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics.utilities import rank_zero_warn

from lightning_stitch.errors import StitchError
from lightning_stitch.networks import StitchedNetwork

if TYPE_CHECKING:
    from lightning_stitch.training.module import StitchedClassifier

STAGES = ("head", "stitches", "neighbours", "all")
"""What can be thawed, each with all that stands before it."""

_SUMS = frozenset({"add", "iadd", "cat", "concat", "concatenate", "stack"})


def parse_schedule(thaw: str | Mapping[int, str]) -> dict[int, str]:
    """The stage that begins at each epoch, in the order of the epochs.

    Args:
        thaw: One of `STAGES`, for all epochs, or {epoch: stage}; epochs may be strings, as JSON has them.
    """
    stages: Any = {0: thaw} if isinstance(thaw, str) else thaw
    if not isinstance(stages, Mapping) or not all(str(epoch).isdecimal() for epoch in stages):
        raise StitchError(f"thaw is {thaw!r}; give one of {list(STAGES)}, or epochs with one each, as {{0: 'head'}}.")
    schedule = {int(epoch): stage for epoch, stage in sorted(stages.items(), key=lambda item: int(item[0]))}
    if unknown := [stage for stage in schedule.values() if stage not in STAGES]:
        raise StitchError(f"thaw names {unknown}; what can be thawed is {list(STAGES)}.")
    if 0 not in schedule:
        raise StitchError(
            f"thaw is {thaw!r}, which does not say what trains in epoch 0; begin with {{0: 'head', ...}}."
        )
    return schedule


def stitch_layers(network: StitchedNetwork, index: int) -> list[nn.Module]:
    """The layers that hold the numbers of the stitch into a fragment: its own, or those that it was folded into."""
    ref = network.recipe.fragments[index]
    if ref.stitch is None or ref.parent is None:
        return []
    if ref.stitch.placement == "explicit":
        return [network.entries[index]]
    fragment: Any = network.fragments[ref.parent if ref.stitch.placement == "producer" else index]
    if ref.stitch.placement == "consumer":
        return [layer for node in _find_entry(fragment).users if (layer := _layer_at(fragment, node)) is not None]
    node = _find_exit(fragment)
    while (layer := _layer_at(fragment, node)) is not None and not _is_weighted(layer.parameters()):
        node = node.all_input_nodes[0]
    return [] if layer is None else [layer]


def parameter_groups(
    network: StitchedNetwork,
    head: nn.Module,
    *,
    backbone_lr_factor: float = 1.0,
    fragment_lr_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """All parameters in groups for an optimizer, whatever is thawed, so that its state can be restored at any epoch.

    Groups have a "name" ("head", "stitch_2" which leads into "fragment_2", ...) and an "lr_factor": 1 for the head,
    for heads inside the network and for the layers that hold stitches, backbone_lr_factor * fragment_lr_decay^k for a
    run of fragments with at most k stitches behind it. A parameter that several fragments share is in the first one's
    group.
    """
    for name, factor in (("backbone_lr_factor", backbone_lr_factor), ("fragment_lr_decay", fragment_lr_decay)):
        if not 0 <= factor < torch.inf:
            raise StitchError(f"{name} is {factor}; give a finite number of at least 0, such as 0.1.")
    members: list[tuple[str, list[nn.Module], float]] = [("head", [head, network.heads], 1.0)]
    runs = network.recipe.runs
    for number, run in enumerate(runs, start=1):
        members.append((f"stitch_{number}", stitch_layers(network, run.fragments[0]), 1.0))
    for number, run in enumerate(runs, start=1):
        factor = backbone_lr_factor * fragment_lr_decay ** network.recipe.num_behind[run.fragments[0]]
        members.append((f"fragment_{number}", [network.fragments[index] for index in run.fragments], factor))
    grouped: set[nn.Parameter] = set()
    groups = []
    for name, modules, factor in members:
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        remaining = [parameter for parameter in parameters if parameter not in grouped]
        grouped.update(remaining)
        if remaining:
            groups.append({"params": remaining, "name": name, "lr_factor": factor})
    return groups


def thaw(network: StitchedNetwork, head: nn.Module, stage: str, *, train_mode: bool = False) -> bool:
    """Let the stage's parameters, with the head's, have gradients and no others; says whether that changed any.

    "neighbours" are, on each branch before and behind a stitch, the nearest layer that mixes channels or positions
    (convolution, linear, attention; it has a parameter with more than one axis longer than 1), with the normalisations
    and scales on the way to it. Skips of residual blocks are not followed.

    Frozen layers go to eval mode; thawed ones to train mode with `train_mode`, otherwise they stay as they are.
    """
    modules, parameters = _select_thawed(network, stage)
    mobile = {*head.parameters(), *parameters, *(p for module in modules for p in module.parameters())}
    changed = False
    for parameter in (*head.parameters(), *network.parameters()):
        if parameter.requires_grad != (parameter in mobile):
            parameter.requires_grad_(parameter in mobile)
            parameter.grad = None
            changed = True
    awake = {part for module in modules for part in module.modules()}
    for part in network.modules():
        if part not in awake:
            part.training = False
        elif train_mode:
            part.training = True
    return changed


def copy_eval_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of layers in eval mode, by their names.

    Stochastic weight averaging clears the statistics of every BatchNorm to estimate them anew, which layers in eval
    mode never do, so that they are put back in the next epoch.
    """
    return {
        name: buffer.clone()
        for path, module in network.named_modules()
        if not module.training
        for name, buffer in module.named_buffers(path, recurse=False)
    }


def put_back(network: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Undo changes to the buffers of which there are copies, in place."""
    for name, buffer in network.named_buffers():
        if name in copies:
            buffer.copy_(copies[name])


def _select_thawed(network: StitchedNetwork, stage: str) -> tuple[list[nn.Module], list[nn.Parameter]]:
    if stage == "all":
        return [network], []
    modules: list[nn.Module] = [*network.heads]
    parameters: list[nn.Parameter] = []
    if stage == "head":
        return modules, parameters
    for index, ref in enumerate(network.recipe.fragments):
        modules += stitch_layers(network, index)
        if stage == "neighbours" and ref.stitch is not None and ref.parent is not None:
            for fragment, backwards in ((network.fragments[ref.parent], True), (network.fragments[index], False)):
                layers, loose = _find_nearest(fragment, backwards=backwards)
                modules += layers
                parameters += loose
    return modules, parameters


def _find_nearest(fragment: Any, *, backwards: bool) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The nearest layers to a fragment's end or beginning, and parameters that belong to no layer (positions)."""
    entry = _find_entry(fragment)
    activations = _find_activations(fragment)
    queue = [_find_exit(fragment)] if backwards else list(entry.users)
    modules: list[nn.Module] = []
    parameters: list[nn.Parameter] = []
    seen: set[fx.Node] = {entry}
    reached = False  # a layer that mixes
    while queue:
        node = queue.pop(0)
        branches = [source for source in node.all_input_nodes if source in activations]
        is_sum = _adds(node) and len(branches) > 1
        if node in seen or node not in activations or (is_sum and not backwards):
            continue
        seen.add(node)
        layer, loose = _layer_at(fragment, node), _find_loose_parameters(fragment, node, activations)
        modules += [] if layer is None else [layer]
        parameters += loose
        if (layer is not None and _is_weighted(layer.parameters())) or (_is_weighted(loose) and not _adds(node)):
            reached = True
        elif backwards:
            # What has other readers than a block's sum comes in by the skip.
            queue += [branch for branch in branches if not is_sum or len(branch.users) == 1]
        else:
            queue += node.users
    if not reached:
        layers = (_layer_at(fragment, node) for node in list(fragment.graph.nodes)[:: -1 if backwards else 1])
        modules += next(([layer] for layer in layers if layer is not None and _is_weighted(layer.parameters())), [])
    return list(dict.fromkeys(modules)), parameters


def _find_entry(fragment: fx.GraphModule) -> fx.Node:
    return next(node for node in fragment.graph.nodes if node.op == "placeholder")


def _find_exit(fragment: fx.GraphModule) -> fx.Node:
    return next(node for node in fragment.graph.nodes if node.op == "output").all_input_nodes[0]


def _layer_at(fragment: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return fragment.get_submodule(str(node.target)) if node.op == "call_module" else None


def _find_activations(fragment: fx.GraphModule) -> set[fx.Node]:
    """The nodes that are made from the images: neither the network's own tensors nor numbers such as a shape."""
    activations = {_find_entry(fragment)}
    for node in fragment.graph.nodes:
        measures = node.target is getattr or (node.op == "call_method" and node.target in ("size", "dim", "numel"))
        if node.op != "output" and not measures and activations.intersection(node.all_input_nodes):
            activations.add(node)
    return activations


def _find_loose_parameters(fragment: fx.GraphModule, node: fx.Node, activations: set[fx.Node]) -> list[nn.Parameter]:
    """The fragment's own parameters that an operation reads, perhaps expanded or resampled."""
    named = dict(fragment.named_parameters(remove_duplicate=False))
    queue, parameters = [node], []
    while queue:
        constants = [source for source in queue.pop().all_input_nodes if source not in activations]
        parameters += [named[str(x.target)] for x in constants if x.op == "get_attr" and x.target in named]
        queue += constants
    return parameters


def _is_weighted(parameters: Any) -> bool:
    return any(sum(length > 1 for length in parameter.shape) > 1 for parameter in parameters)


def _adds(node: fx.Node) -> bool:
    """Whether an operation adds or joins what it reads; in-place sums are functions of another name."""
    return node.op in ("call_function", "call_method") and node.name.rstrip("_0123456789") in _SUMS


def _raise_eps(group: dict[str, Any]) -> None:
    """Raise an optimizer's eps where the parameters' dtype has no number so small: divided by 0, they become NaN."""
    eps = group.get("eps")
    for dtype in {parameter.dtype for parameter in group["params"]}:
        if isinstance(eps, float) and eps > 0 and float(torch.tensor(eps, dtype=dtype)) == 0:
            group["eps"] = torch.finfo(dtype).tiny
            rank_zero_warn(
                f"The optimizer's eps={eps:g} is 0 in {dtype}, and every number would become NaN; it is raised to "
                f"{group['eps']:.2g}. Give an optimizer with a larger eps, or train in 16-mixed or bf16-true."
            )


class TrainingPlan:
    """What trains when, and how fast.

    Lightning's `BaseFinetuning` adds groups of parameters to the optimizer as it thaws them, and leaves buffers alone.
    Here all groups are there from the start, so that a checkpoint of any epoch fits, and frozen buffers are kept.
    The arguments are those of `StitchedClassifier`.
    """

    def __init__(
        self,
        thaw: str | Mapping[int, str],
        *,
        train_mode: bool,
        backbone_lr_factor: float,
        fragment_lr_decay: float,
    ) -> None:
        self.schedule = parse_schedule(thaw)
        self.train_mode = train_mode
        self.backbone_lr_factor = backbone_lr_factor
        self.fragment_lr_decay = fragment_lr_decay
        self._frozen_buffers: dict[str, Tensor] = {}
        self._lr: float | None = None

    def thaw(self, module: StitchedClassifier, *, epoch: int) -> bool:
        """Freeze and thaw as an epoch asks for; says whether that changed anything."""
        assert module.network is not None
        assert module.head is not None
        stage = next(stage for first, stage in reversed(self.schedule.items()) if first <= epoch)
        return thaw(module.network, module.head, stage, train_mode=self.train_mode)

    def make_optimizer(self, module: StitchedClassifier) -> Optimizer:
        """The module's optimizer, every group's learning rate multiplied by its factor."""
        assert module.network is not None
        assert module.head is not None
        groups = parameter_groups(
            module.network,
            module.head,
            backbone_lr_factor=self.backbone_lr_factor,
            fragment_lr_decay=self.fragment_lr_decay,
        )
        if module.lr is not None:
            groups = [{**group, "lr": module.lr} for group in groups]
        self._lr = module.lr
        optimizer = module.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
            _raise_eps(group)
        return optimizer

    def spread_learning_rate(self, module: StitchedClassifier) -> None:
        """Give each group its share of `module.lr`, where a finder has set that since the optimizer was made."""
        if module.lr is None or module.lr == self._lr:
            return
        self._lr = module.lr
        for optimizer in module.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = module.lr * group.get("lr_factor", 1.0)

    def start(self, module: StitchedClassifier) -> None:
        """Begin a run in its first epoch; a run that goes on within an epoch never sees that one begin."""
        self._frozen_buffers = {}
        self.start_epoch(module)

    def start_epoch(self, module: StitchedClassifier) -> None:
        """Put back buffers that were to stay, freeze and thaw, and note the buffers that are to stay from now on."""
        network = module.network
        assert network is not None
        put_back(network, self._frozen_buffers)
        strategy: Any = module.trainer.strategy
        if self.thaw(module, epoch=module.current_epoch) and isinstance(strategy.model, DistributedDataParallel):
            # DDP exchanges only the gradients of the parameters that needed them when it was made.
            strategy.model = module
            strategy.configure_ddp()
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise StitchError(
                f"Nothing is left to train: thaw is {self.schedule}, and this head has no parameters. Thaw more, or "
                f"set max_epochs=0."
            )
        self._frozen_buffers = copy_eval_buffers(network)
