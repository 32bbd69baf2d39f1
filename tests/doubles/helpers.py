"""Small sources, images and search spaces that several test files share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import r2_score
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.heads.ridge import DEFAULT_STRENGTHS
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import FragmentRef, Placement, Preprocessing, Recipe, SourceRef, StitchSpec
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import self_stitched, unmodified
from lightning_stitch.search.results import SearchResult
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source, load_source
from lightning_stitch.stitching.activations import calibrate
from lightning_stitch.stitching.candidates import Candidate, Kind
from lightning_stitch.stitching.folding import fold_into_consumer, fold_into_producer
from lightning_stitch.stitching.segments import segment
from lightning_stitch.stitching.stitches import Stitch


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Images that share nothing: uniform in [0, 1]."""
    return torch.rand(*shape, generator=seeded(seed))


def digits(count: int, size: int, *, first: int = 0, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Handwritten digits as (count, 3, size, size) in [0, 1], and their labels."""
    found = load_digits()
    chosen = torch.tensor(found.target < classes).nonzero().flatten()[first : first + count]
    images = torch.tensor(found.images[chosen.numpy()] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    resized = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return resized.clamp(0, 1), torch.tensor(found.target[chosen.numpy()])


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Give all weights and running statistics random values, zero-initialised ones too, so that every layer counts."""
    generator = seeded(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.2, generator=generator)
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, generator=generator)
            if part.bias is not None:
                part.bias.data.normal_(0, 0.1, generator=generator)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(x: Tensor, y: Tensor) -> float:
    """Relative to the second."""
    return float((x - y).detach().norm() / y.detach().norm())


def related(n: int, cx: int, cy: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two activations that share part of what they say."""
    common = normal(n, 3, seed=seed)
    x = common @ normal(3, cx, seed=seed + 1) + 0.5 * normal(n, cx, seed=seed + 2)
    y = common @ normal(3, cy, seed=seed + 3) + 0.5 * normal(n, cy, seed=seed + 4)
    return x, y


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


def references(space: SearchSpace) -> list[Candidate]:
    """Every source as it is, and every source stitched to itself at each of its cuts that varies."""
    return [*unmodified(space), *self_stitched(space)]


def sums_of(network: nn.Module, size: tuple[int, int, int]) -> Cost:
    """What a network costs in parameters and MACs, counted in it; of parts that are not assembled no more is known."""
    cost = network_cost(network, size)
    return Cost(cost.params, cost.macs)


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


@cache
def donor(architecture: str, seed: int = 0) -> Source:
    """A small timm network whose random weights leave no layer without effect."""
    source = load_source(architecture, pretrained=False)
    shake(source.module, seed)
    return source


def live(module: nn.Module, name: str, *, size: int = 16, channels: int = 3, fixed_size: bool = False) -> Source:
    """A hand-written network as a source."""
    preprocessing = Preprocessing((channels, size, size), (0.4,) * channels, (0.3,) * channels, fixed_size=fixed_size)
    return load_source(module, name=name, preprocessing=preprocessing)


def plain(
    name: str, widths: Sequence[int], *, seed: int, classes: int = 4, strides: Sequence[int] = (1, 2, 1)
) -> Source:
    """Three blocks of convolution and ReLU, pooling and a linear layer; its cuts are "0", "1" and the vector "2"."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, strides, strict=False):
        layers.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()))
    layers[-1] = nn.Sequential(*layers[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return live(shake(nn.Sequential(*layers, nn.Linear(widths[-1], classes)), seed), name)


def space_of(
    sources: Sequence[Source],
    images: Tensor,
    *,
    settings: CalibrationSettings | None = None,
    budget: Budget | None = None,
    bias: bool = True,
    ridge: float = 1e-3,
    max_fragments: int = 16,
) -> SearchSpace:
    """Sources cut, calibrated on one batch and ready to be searched."""
    settings = settings or CalibrationSettings()
    parts = [segment(source, settings, tuple(images.shape[1:])) for source in sources]
    costs = CompositionCosts(parts, bias=bias, max_fragments=max_fragments)
    return SearchSpace(
        [calibrate(part, [images], settings) for part in parts], settings, costs=costs, budget=budget, ridge=ridge
    )


def filled(spec: StitchSpec, seed: int = 0) -> Stitch:
    """An explicit stitch whose every number counts."""
    stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
    for tensor in stitch.state_dict().values():
        tensor.normal_(0, max(tensor.shape[-1], 1) ** -0.5, generator=seeded(seed))
    return stitch


def joined(before: fx.GraphModule, stitch: Stitch, after: fx.GraphModule, placement: Placement) -> nn.Sequential:
    """Sender, stitch and receiver in a row, on copies of their own, the stitch's numbers where the placement says."""
    before, after = copy.deepcopy(before), copy.deepcopy(after)
    joint = Stitch(dataclasses.replace(stitch.spec, placement=placement))
    joint.load_state_dict({key: stitch.state_dict()[key] for key in joint.state_dict()})
    if placement == "producer":
        fold_into_producer(before, stitch)
    elif placement == "consumer":
        fold_into_consumer(after, stitch)
    return nn.Sequential(before, joint, after).eval()


@cache
def calibrated_pool(*architectures: str) -> Pool:
    """Donors cut everywhere and calibrated on digits of 32 pixels."""
    pool = Pool([donor(name) for name in architectures], (3, 32, 32), settings=CalibrationSettings(granularity="all"))
    pool.calibrate([digits(32, 32)[0]])
    return pool


def composed(*fragments: tuple[str, str | None, str | None], share_weights: bool = False) -> StitchedNetwork:
    """A network of its own of the fragments named, with stitches fitted on digits."""
    pool = calibrated_pool(*sorted({name for name, _, _ in fragments}))
    return pool.assemble(pool.stitch(fragments), share_weights=share_weights)


def path(candidate: Candidate) -> list[tuple[str, str | None, str | None]]:
    """A candidate's fragments as (source, start, end)."""
    return [(ref.source, ref.start, ref.end) for ref in candidate.recipe.fragments]


@contextmanager
def images_seen(source: Source) -> Iterator[list[int]]:
    """How many images go through a source's first layer, one entry for each time that it runs."""
    seen: list[int] = []
    first = next(module for module in source.module.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


@contextmanager
def pieces_run(pool: Pool) -> Iterator[list[str]]:
    """The source of each piece that a pool runs, whatever for."""
    ran: list[str] = []
    hooks = [
        piece.register_forward_pre_hook(lambda module, inputs, name=part.name: ran.append(name))
        for part in pool.parts
        for piece in part.pieces
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def records(result: SearchResult) -> list[tuple[object, ...]]:
    """All that a search found, in its order, but for the time that it took."""
    return [(r.candidate.kind, r.candidate.recipe.to_dict(), r.scores, r.latency_ms) for r in result.ranked]


class Recorder:
    """A progress that remembers each stage's name, total and steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None, int]] = []

    def start(self, stage: str, total: int | None) -> None:
        self.stages.append((stage, total, 0))

    def advance(self, steps: int) -> None:
        stage, total, done = self.stages[-1]
        self.stages[-1] = (stage, total, done + steps)


def bare_candidate(source: str = "a", product: float = 1.0, kind: Kind = "stitched") -> Candidate:
    """What rankings look at, with nothing to run."""
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    ref = SourceRef(source, source, "timm", source, "sha256:0", preprocessing)
    recipe = Recipe((ref,), (FragmentRef(source, None, None),), scores={"cka_product": product})
    return Candidate(recipe, kind, (), Cost(1, 1))


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


def assert_same_weights(module: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=0)
