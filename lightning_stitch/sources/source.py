"""Sources: from what a user writes ("resnet50.a1_in1k", "local-dir:PATH", a module) to a network with identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_stitch.cutting import Cut, CutGraph, RandomNumbers
from lightning_stitch.errors import RecipeError, SourceError
from lightning_stitch.recipe import Preprocessing, SourceRef
from lightning_stitch.settings import Granularity
from lightning_stitch.sources.blueprint import Blueprint
from lightning_stitch.sources.finding import AnySource, find_source, find_sources, make_distinct
from lightning_stitch.sources.meta_device import build_on_meta
from lightning_stitch.sources.python_modules import call_factory, declared_config, declared_preprocessing
from lightning_stitch.sources.spec import SourceSpec, check_licence, check_preprocessing, reserved_arguments
from lightning_stitch.sources.timm_models import create_timm
from lightning_stitch.sources.torchvision_models import create_torchvision

_BUILDERS: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "timm": create_timm,
    "torchvision": create_torchvision,
    "python": call_factory,
}


@dataclass(slots=True)
class Source:
    """A pre-trained network in eval mode, with its identity, licence and preprocessing.

    It is on the CPU unless it was given as a live module that is elsewhere. `graphs` holds those made already
    (`graph_at`).
    """

    ref: SourceRef
    module: nn.Module
    graphs: dict[tuple[int, int, int], CutGraph] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.ref.spec!r}, images {'x'.join(map(str, self.preprocessing.input_size))})"

    @property
    def name(self) -> str:
        """The short name by which fragments refer to it."""
        return self.ref.name

    @property
    def preprocessing(self) -> Preprocessing:
        """How it wants its images."""
        return self.ref.preprocessing

    @property
    def licence(self) -> str | None:
        """SPDX identifier or the hub's licence word; None where unknown."""
        return self.ref.licence

    @property
    def graph(self) -> CutGraph:
        """The network traced and cut at its native input size, as `graph_at`."""
        return self.graph_at(self.preprocessing.input_size)

    def graph_at(self, input_size: tuple[int, int, int]) -> CutGraph:
        """The network traced and cut for images of (channels, height, width); made at the first use of that size.

        Raises:
            CutError: If it cannot be traced, has no cut, or does not take images of that size.
        """
        if input_size not in self.graphs:
            traced = next(iter(self.graphs.values()), None)
            graph = CutGraph(self.module, input_size) if traced is None else traced.at(input_size)
            self.graphs[input_size] = graph
        return self.graphs[input_size]

    def cuts(self, granularity: Granularity | Sequence[str] = "blocks") -> list[Cut]:
        """Its cuts at the native input size, as `CutGraph.cuts`."""
        return self.graph.cuts(granularity)

    def fragment(self, start: str | None, end: str | None) -> nn.Module:
        """The part between two cuts at the native size, as `CutGraph.fragment`; it takes normalised images."""
        return self.graph.fragment(start, end)


def load_source(
    spec: str | nn.Module,
    *,
    name: str | None = None,
    pretrained: bool = True,
    licence: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Load one source.

    Random weights depend on the spec alone, and the global random state of torch is left as it was. A live module is
    copied, not changed. Sources compute in float32, whatever precision their weights come in.

    Args:
        spec: A timm name, "torchvision:NAME", "local-dir:PATH" (timm's config.json and model.safetensors),
            "hf-hub:ORG/NAME[@REVISION]" (the same files), "python:package.module:factory", or a live module.
        name: Short name; None: the timm name, the folder's or repository's name, NAME, factory. Live modules need one.
        pretrained: Whether to load weights; False: random ones, without the network except for a hub's config.json.
            Factories and live modules bring their own weights either way.
        licence: Overrides what the source says of itself.
        arguments: Keyword arguments of the builder or factory, plain JSON.
        preprocessing: Overrides what the source says of itself; factories and live modules may say nothing.

    Returns:
        The source, its module in eval mode, its weights hashed as they came.

    Raises:
        SourceError: If the source cannot be found or reached, its weights do not fit or hold NaN, or its preprocessing
            is unknown.

    Example:
        >>> source = load_source("test_resnet.r160_in1k", pretrained=False)
        >>> source.name, source.preprocessing.input_size
        ('test_resnet.r160_in1k', (3, 160, 160))
    """
    return _load(find_source(SourceSpec(spec, name, pretrained, licence, arguments, preprocessing)))


def load_sources(sources: Sequence[AnySource]) -> list[Source]:
    """Load several sources; all are found before the first one's weights are read.

    A name that occurs again gets "#2", "#3", ... behind it.

    Args:
        sources: Specs as in `load_source`, mappings {"spec": ..., and keyword arguments of `load_source`}, or
            `Preflight.blueprints`, which are not looked for or traced again.

    Raises:
        SourceError: If there are none, or some cannot be found (all of those are named), or one cannot be loaded.
    """
    blueprints = find_sources(sources)
    names = make_distinct([blueprint.name for blueprint in blueprints])
    return [_load(dataclasses.replace(blueprint, name=name)) for blueprint, name in zip(blueprints, names, strict=True)]


def outline(blueprint: Blueprint, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Source | None:
    """A found source on the meta device, without its weights; None where only the user's own code can build it.

    `shapes` are those of the tensors in its weight file, by name; tensors of these shapes are loaded strictly.

    Raises:
        SourceError: If it cannot be built, or the shapes do not fit.
    """
    if (make := blueprint.outline) is None:
        return None

    def build() -> nn.Module:
        return make(None if shapes is None else {name: torch.zeros(shape) for name, shape in shapes.items()})

    try:
        with RandomNumbers(_seed_of(blueprint.spec)):
            try:
                module = build_on_meta(build)
            except SourceError:
                # What is not timm's or torchvision's own may need numbers while it is built.
                module = build()
        module = _in_float32(module.eval())
        return Source(ref=_ref(blueprint, "", module), module=module)
    except SourceError as error:
        raise SourceError(f"Source {blueprint.spec!r}: {error}") from error


def build_architecture(ref: SourceRef, *, trust_factory: bool = False) -> nn.Module:
    """Rebuild a source's architecture in eval mode, with random weights that depend on `ref.spec` alone.

    Neither the network nor files are read.

    Args:
        ref: The source's identity, from a recipe.
        trust_factory: Whether a "python" source's factory may be imported and called; that runs its code.

    Raises:
        RecipeError: If the builder does not know the architecture, or it may not or cannot be built.
    """
    problem = f"The architecture of source {ref.name!r} cannot be rebuilt: "
    if ref.builder == "live":
        raise RecipeError(
            f"{problem}it was given as a live module ({ref.architecture}). Load it as 'python:package.module:factory', "
            f"and compose again."
        )
    if ref.builder == "python" and not trust_factory:
        raise RecipeError(
            f"{problem}that would import {ref.architecture.partition(':')[0]!r} and call {ref.architecture!r} with "
            f"{ref.arguments}. If you trust that code, pass trust_factory=True."
        )
    if reserved := reserved_arguments(ref.builder, ref.arguments):
        raise RecipeError(f"{problem}its arguments {reserved} would make {ref.builder} read files or the network.")
    if ref.builder not in _BUILDERS:
        raise RecipeError(f"{problem}its builder is {ref.builder!r}; known are {sorted(_BUILDERS)}.")
    try:
        with RandomNumbers(_seed_of(ref.spec)):
            return _in_float32(_BUILDERS[ref.builder](ref.architecture, ref.arguments)).eval()
    except SourceError as error:
        raise RecipeError(problem + str(error)) from error


def _load(blueprint: Blueprint) -> Source:
    """Build a source that was found and take its identity, and the graphs of its outline where they are its own."""
    try:
        with RandomNumbers(_seed_of(blueprint.spec)):
            module = blueprint.build().eval()
        weight_hash = _weight_hash(module.state_dict())
        module = _in_float32(module)
        source = Source(ref=_ref(blueprint, weight_hash, module), module=module)
    except SourceError as error:
        raise SourceError(f"Source {blueprint.spec!r}: {error}") from error
    for input_size, outlined in blueprint.graphs.items():
        graph = outlined.carry_over(module)
        if graph is not None:
            source.graphs[input_size] = graph
    return source


def _ref(blueprint: Blueprint, weight_hash: str, module: nn.Module) -> SourceRef:
    """The identity; the built network tells what the blueprint could not."""
    return SourceRef(
        name=blueprint.name,
        spec=blueprint.spec,
        builder=blueprint.builder,
        architecture=blueprint.architecture,
        weight_hash=weight_hash,
        preprocessing=blueprint.preprocessing or check_preprocessing(declared_preprocessing(module)),
        arguments=blueprint.arguments,
        revision=blueprint.revision,
        licence=blueprint.licence or check_licence(declared_config(module).get("license")),
    )


def _in_float32(module: nn.Module) -> nn.Module:
    """Sources of several precisions meet in one network, and images come in float32."""
    is_mixed = any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters())
    return module.float() if is_mixed else module


def _seed_of(spec: str) -> int:
    """A seed that depends on the spec alone."""
    return int.from_bytes(hashlib.sha256(spec.encode()).digest()[:8], "big")


def _weight_hash(state_dict: Mapping[str, Any]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and bytes of all tensors, which must exist and hold no NaN."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in sorted(state_dict.items()) if isinstance(value, Tensor)}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta or is_lazy(tensor)]
    if empty:
        raise SourceError(
            f"{len(empty)} tensors ({empty[0]}, ...) are on the meta device, or lazy. Load weights into them, or run a "
            f"batch of images through the network, first."
        )
    broken = [name for name, tensor in tensors.items() if torch.isnan(tensor).any()]
    if broken:
        raise SourceError(
            f"{len(broken)} of {len(tensors)} weight tensors hold NaN ({', '.join(broken[:3])}). Choose other weights."
        )
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
