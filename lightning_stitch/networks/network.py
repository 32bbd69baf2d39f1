"""The stitched network: fragments and stitches in a row, as one `nn.Module` that takes images in [0, 1]."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_stitch.cutting import CutGraph, copied, reference_tensor, with_tensors
from lightning_stitch.errors import CutError, RecipeError
from lightning_stitch.hub import CardDetails, CardSubject, open_folder, save_folder
from lightning_stitch.recipe import Recipe, StitchSpec
from lightning_stitch.sources import Preprocess, build_architecture, view_size
from lightning_stitch.stitching import GlobalAverage, Stitch, fold_into_consumer, fold_into_producer


class StitchedNetwork(nn.Module):
    """A network composed of fragments of several sources.

    Its forward takes images (batch, channels, height, width), float, in [0, 1], not normalised, and gives the last
    source's features (batch, features) or its output, whichever the recipe ends at; where it ends early, the average of
    its last cut over positions.

    Build one with `assemble` (from sources at hand) or `StitchedNetwork.from_recipe` (structure only).

    Attributes:
        recipe: Its structure.
        preprocess: The start source's preprocessing.
        fragments: The fragments, in forward order; their parameters are their own, or shared among the fragments of
            one source where the recipe says so.
        stitches: `Stitch` or `nn.Identity` between each two fragments.
        pool: `GlobalAverage` where the network ends early, else `nn.Identity`.
    """

    def __init__(
        self,
        recipe: Recipe,
        fragments: Sequence[nn.Module],
        stitches: Sequence[nn.Module],
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.preprocess = Preprocess(recipe.preprocessing)
        self.fragments = nn.ModuleList(fragments)
        self.stitches = nn.ModuleList(stitches)
        self.pool = nn.Identity() if pool is None else pool

    def forward(self, images: Tensor) -> Tensor:
        """Features or output of the last fragment's source, for images in [0, 1]."""
        x: Tensor = self.fragments[0](self.preprocess(images))
        for stitch, fragment in zip(self.stitches, self.fragments[1:], strict=True):
            x = fragment(stitch(x))
        pooled: Tensor = self.pool(x)
        return pooled

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, trust_factory: bool = False) -> StitchedNetwork:
        """Rebuild a recipe's structure, with random weights: needs no network, no files and no source weights.

        Load the numbers with `load_state_dict` afterwards.

        Args:
            recipe: The recipe.
            trust_factory: Allow importing and calling the factory that a "python:" source names.

        Raises:
            RecipeError: If a source cannot be rebuilt, or its architecture no longer has the recipe's cuts.
        """
        if recipe.input_size is None:
            raise RecipeError("This recipe does not say which image size it was calibrated on (input_size).")
        graphs = {}
        used = {fragment.source for fragment in recipe.fragments}
        for ref in recipe.sources:
            if ref.name not in used:
                continue
            network = build_architecture(ref, trust_factory=trust_factory)
            graphs[ref.name] = CutGraph(network, view_size(ref.preprocessing, recipe.input_size))
        stitches = [None if spec is None else Stitch(spec) for spec in recipe.stitches]
        return assemble(recipe, graphs, stitches)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        details: CardDetails | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write all that `from_pretrained` needs, and a card: config.json, model.safetensors, README.md, a picture.

        Only the fragments are written, weights that several of them share once. Trained weights are as they are.

        Args:
            directory: The folder; made if it does not exist.
            details: What the card says beyond the recipe.
            name: The card's title; None: the folder's name.
            overwrite: Replace files of these names.

        Raises:
            RecipeError: If a source was given as a live module, which nobody else could build.
            StitchError: If the folder holds such files already.
        """
        subject = CardSubject(self.recipe, self.describe(), "StitchedNetwork")
        width = self.num_features
        save_folder(
            {"network": self}, directory, subject, num_outputs=width, details=details, name=name, overwrite=overwrite
        )

    @classmethod
    def from_pretrained(cls, where: str | Path, *, trust_factory: bool = False) -> StitchedNetwork:
        """Load what `save_pretrained` or `publish` wrote; no source and, from a folder, no network is needed.

        Of a saved classifier it takes the network and leaves the head. Nothing is unpickled: weights are checked
        against the config's hash and the recipe's shapes first, and loading is strict.

        Args:
            where: A folder, or a hub repository "ORG/NAME" or "ORG/NAME@REVISION".
            trust_factory: Allow importing and calling the factory that a "python:" source names.

        Raises:
            SourceError: If the folder or repository cannot be found.
            RecipeError: If config and weights do not fit each other, or a source cannot be built.
            StitchError: If a file is missing or no plain file.
        """
        folder = open_folder(where, loader="StitchedNetwork", also="classifier")
        recipe = folder.recipe
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"{str(where)!r} holds an ensemble; StitchedClassifier.from_pretrained loads it.")
        parts = folder.load(
            lambda: nn.ModuleDict({"network": cls.from_recipe(recipe, trust_factory=trust_factory)}),
            trust_factory=trust_factory,
        )
        network: StitchedNetwork = parts.get_submodule("network")  # type: ignore[assignment]
        return network

    @property
    def num_features(self) -> int:
        """Width of the output."""
        with torch.no_grad():
            size = self.recipe.input_size
            assert size is not None
            modes = {module: module.training for module in self.modules()}
            self.eval()
            like = reference_tensor(self)
            width = self(torch.zeros((1, *size), device=like.device, dtype=like.dtype)).shape[-1]
            for module, mode in modes.items():
                module.training = mode
        return int(width)

    def describe(self) -> str:
        """The composition in words: fragments, stitches and where they live, parameters, MACs, activations, scores."""
        recipe = self.recipe
        lines = [f"Stitched network of {len(recipe.fragments)} fragment{'s' * (len(recipe.fragments) > 1)}"]
        for index, fragment in enumerate(recipe.fragments):
            params = sum(p.numel() for p in self.fragments[index].parameters())
            lines.append(
                f"  {fragment.source}: {fragment.start or 'image'} .. {fragment.end or 'output'}, "
                f"{params / 1e6:.3f} M parameters"
            )
            if index < len(recipe.stitches):
                spec = recipe.stitches[index]
                if spec is None:
                    continue
                where = {
                    "explicit": "a layer of its own",
                    "producer": "folded into the layer before",
                    "consumer": "folded into the layer behind",
                }[spec.placement]
                sizes = (
                    f"{spec.in_channels}x{_size(spec.in_size)} -> {spec.out_channels}x{_size(spec.out_size)}"
                    f" ({spec.in_format} -> {spec.out_format})"
                )
                scores = ", ".join(
                    f"{name} {value:.3f}"
                    for name, value in (("CKA", spec.cka), ("held-out R2", spec.r2))
                    if value is not None
                )
                lines.append(f"    stitch {sizes}, {where}" + (f"; {scores}" if scores else ""))
        if recipe.pooled:
            averages = isinstance(self.pool, GlobalAverage) and self.pool.format != "vector"
            lines.append("    ends early here" + (", averaged over positions" if averages else ""))
        params = sum(p.numel() for p in self.parameters())
        macs = recipe.scores.get("macs")
        total = f"  {params / 1e6:.3f} M parameters"
        if recipe.share_weights:
            holders = Counter(p for fragment in self.fragments for p in fragment.parameters())
            shared = sum(p.numel() for p, count in holders.items() if count > 1)
            total += f" ({shared / 1e6:.3f} M of them shared by several fragments)"
        total += "" if macs is None else f", {macs / 1e6:.1f} M MACs"
        activations = recipe.scores.get("activation_bytes")
        total += "" if activations is None else f", {activations / 1e6:.3g} MB of activations"
        lines.append(total + (f" at {_size(recipe.input_size[1:])}" if recipe.input_size else ""))
        if recipe.refinements:
            lines.append(f"  refined: {', '.join(recipe.refinements)}")
        for reason in dict.fromkeys(recipe.unhealed.values()):
            layers = [layer for layer, why in recipe.unhealed.items() if why == reason]
            lines.append(f"  not healed ({reason}): {', '.join(layers)}")
        shown = ("params", "macs", "activation_bytes")
        other = {name: value for name, value in recipe.scores.items() if name not in shown}
        if other:
            lines.append("  " + ", ".join(f"{name} {value:.4g}" for name, value in other.items()))
        return "\n".join(lines)


def assemble(
    recipe: Recipe,
    graphs: Mapping[str, CutGraph],
    stitches: Sequence[Stitch | None],
    tensors: Sequence[Mapping[str, Tensor]] | None = None,
) -> StitchedNetwork:
    """Build a stitched network from cut sources and fitted stitches; folds what the recipe says is folded.

    Args:
        recipe: The structure.
        graphs: The cut graph of each source, by name. Their parameters are copied: once for each fragment, or, where
            the recipe shares weights, once for all fragments of the source.
        stitches: One for each of the recipe's; explicit where they hold numbers, whatever their placement.
        tensors: For each fragment the parameters and buffers, by their names in the source, that have other numbers
            than the source's; None: none has.

    Raises:
        RecipeError: If a source's graph lacks a cut of the recipe, or a fold is not possible.
    """
    try:
        return _assemble(recipe, graphs, stitches, tensors or [{}] * len(recipe.fragments))
    except CutError as error:
        raise RecipeError(f"The recipe does not fit its sources: {error}") from error


def _assemble(
    recipe: Recipe,
    graphs: Mapping[str, CutGraph],
    stitches: Sequence[Stitch | None],
    tensors: Sequence[Mapping[str, Tensor]],
) -> StitchedNetwork:
    copies: dict[str, dict[int, Any]] = {}
    fragments = []
    for ref, own in zip(recipe.fragments, tensors, strict=True):
        fragment = graphs[ref.source].fragment(ref.start, ref.end, share=True)
        memo = copies.setdefault(ref.source, {}) if recipe.share_weights else {}
        fragments.append(with_tensors(copied(fragment, memo), own))
    joints: list[nn.Module] = []
    for index, (spec, stitch) in enumerate(zip(recipe.stitches, stitches, strict=True)):
        if spec is None:
            joints.append(nn.Identity())
            continue
        joints.append(placed_stitch(spec, stitch, fragments[index], fragments[index + 1]))
    last = recipe.fragments[-1]
    pool = GlobalAverage.of(graphs[last.source].find(str(last.end))) if recipe.pooled else None
    network = StitchedNetwork(recipe, fragments, joints, pool)
    return network.to(reference_tensor(network).device).eval()


def placed_stitch(spec: StitchSpec, stitch: Stitch | None, before: fx.GraphModule, after: fx.GraphModule) -> Stitch:
    """The joint of two fragments, with its numbers where the spec places them: in itself, or folded into a neighbour.

    Args:
        spec: The stitch's structure.
        stitch: The fitted stitch, explicit where it holds numbers; None: all are zero.
        before: The fragment before, changed in place where it takes the stitch in.
        after: The fragment behind, likewise.

    Raises:
        CutError: If a fold is not possible.
    """
    joint = Stitch(spec)
    numbers = stitch if stitch is not None and stitch.weight is not None else _zero_stitch(spec)
    if spec.placement == "explicit":
        joint.load_state_dict(numbers.state_dict())
        return joint
    if joint.prefix is not None and numbers.prefix is not None:
        joint.prefix.copy_(numbers.prefix)
    if spec.placement == "producer":
        fold_into_producer(before, numbers)
    else:
        fold_into_consumer(after, numbers)
    return joint


def _zero_stitch(spec: StitchSpec) -> Stitch:
    return Stitch(dataclasses.replace(spec, placement="explicit"))


def _size(size: Sequence[int] | None) -> str:
    return "1" if size is None else "x".join(map(str, size))
