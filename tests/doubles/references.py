"""Slow and plain computations of what the package computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.metrics import r2_score
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.cost import Cost
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.heads.ridge import DEFAULT_STRENGTHS


def counted_macs(network: nn.Module, size: tuple[int, int, int]) -> int:
    """The reference: half the FLOPs that torch counts in a real run of one image."""
    counter = FlopCounterMode(display=False)
    # Some kernels for attention (those that gradients rule out among them) and recurrent layers are unknown to it.
    was_enabled, *_ = torch.backends.mkldnn.set_flags(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network.eval()(torch.zeros(1, *size))
    finally:
        torch.backends.mkldnn.set_flags(was_enabled)
    return counter.get_total_flops() // 2


class _Alive(TorchDispatchMode):
    """The most bytes alive at once of all that operators give, a module's weights apart."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weights = (*module.parameters(), *module.buffers())
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self.alive: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.alive[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.alive = {x: size for x, size in self.alive.items() if not x.expired() and x not in self.weights}
        self.most = max(self.most, sum(self.alive.values()))
        return result


def counted_bytes(graph: fx.GraphModule, size: tuple[int, ...]) -> int:
    """The reference: what is alive in a real run of one image that lets go of each value after its last reader."""

    class Run(fx.Interpreter):
        def placeholder(self, *_: Any) -> Tensor:
            return torch.zeros(1, *size)

    alive = _Alive(graph)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), alive:
        Run(graph.eval()).run()
    return alive.most


def left_out_predictions(x: Tensor, y: np.ndarray) -> np.ndarray:
    """Ridge regression fitted again without each row, at the strength of least squared error."""
    values = x.double().numpy()
    scale = ((values - values.mean(0)) ** 2).sum() / min(len(values) - 1, values.shape[1])
    found = []
    for strength in DEFAULT_STRENGTHS:
        rows = []
        for i in range(len(values)):
            others, targets = np.delete(values, i, 0), np.delete(y, i, 0)
            centred = others - others.mean(0)
            penalised = centred.T @ centred + strength * scale * np.eye(values.shape[1])
            weights = np.linalg.solve(penalised, centred.T @ targets)
            rows.append(targets.mean(0) + (values[i] - others.mean(0)) @ weights)
        found.append(np.stack(rows))
    return min(found, key=lambda predictions: ((predictions - y) ** 2).sum())


def left_out_r2(x: Tensor, y: np.ndarray) -> float:
    return r2_score(y, left_out_predictions(x, y), multioutput="variance_weighted")


def sums_of(network: nn.Module, size: tuple[int, int, int]) -> Cost:
    """What a network costs in parameters and MACs, counted in it; of parts that are not assembled no more is known."""
    cost = network_cost(network, size)
    return Cost(cost.params, cost.macs)
