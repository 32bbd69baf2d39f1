"""The stitched network: a tree of fragments and stitches with taps, as one `nn.Module` that takes images in [0, 1]."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home

from lightning_stitch.cutting import CutGraph, copy_module, reference_tensor, with_tensors
from lightning_stitch.errors import CutError, RecipeError
from lightning_stitch.heads import RidgeHead
from lightning_stitch.hub import CardDetails, CardSubject, open_pretrained, save_folder
from lightning_stitch.recipe import Recipe, StitchSpec, Tap
from lightning_stitch.sources import Preprocess, build_architecture, view_size
from lightning_stitch.stitching import GlobalAverage, Stitch, check_images, fold_into_consumer, fold_into_producer


class StitchedNetwork(nn.Module):
    """A composition of fragments of several sources: a chain, an early exit, sources side by side, or an ensemble.

    Its forward takes images (batch, channels, height, width), float, in [0, 1], not normalised: the first batch with
    gradients is checked, and the first one without after each `eval()`; others cost nothing. It gives what its taps
    read, side by side (batch, num_features): a last source's features or output, or the average of a cut over its
    positions. An average of members gives log-probabilities (batch, classes), which serve as logits.

    Attributes:
        recipe: Its structure.
        entries: What leads into each fragment: its source's preprocessing, a `Stitch`, or nothing (`nn.Identity`).
        fragments: The fragments, parents first; their parameters are their own, or shared among the fragments of one
            source where the recipe says so.
        taps: What reads each tap's activation: `GlobalAverage`, or `nn.Identity` of a vector.
        heads: Each member's linear head, where the recipe averages members that have one; else empty.
    """

    def __init__(
        self,
        recipe: Recipe,
        entries: Sequence[nn.Module],
        fragments: Sequence[nn.Module],
        taps: Sequence[nn.Module],
        heads: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.entries = nn.ModuleList(entries)
        self.fragments = nn.ModuleList(fragments)
        self.taps = nn.ModuleList(taps)
        self.heads = nn.ModuleList(heads)
        parents = [fragment.parent for fragment in recipe.fragments]
        # An activation is let go of as soon as its last fragment has begun.
        self._last_child = {parent: index for index, parent in enumerate(parents) if parent is not None}
        self._checked: set[bool] = set()  # whether images were with gradients (True) and without

    def train(self, mode: bool = True) -> StitchedNetwork:
        """Set the mode; in eval mode the next images may come from elsewhere, and are checked once more."""
        if not mode:
            self._checked.discard(False)
        return super().train(mode)

    def check_images(self, images: Any) -> None:
        """Refuse (CalibrationError) what is not images (batch, channels, height, width), finite floats in [0, 1]."""
        check_images(images, (self.recipe.input_size[0], None, None))

    def forward(self, images: Tensor) -> Tensor:
        """What the taps give, or the log-probabilities of an average, for images in [0, 1]."""
        if torch.is_grad_enabled() not in self._checked and not _is_traced(images):
            self.check_images(images)
            self._checked.add(torch.is_grad_enabled())
        activations: dict[int, Tensor] = {}
        vectors: dict[int, Tensor] = {}
        recipe = self.recipe
        for index, (ref, entry, fragment) in enumerate(
            zip(recipe.fragments, self.entries, self.fragments, strict=True)
        ):
            x = images if ref.parent is None else activations[ref.parent]
            if ref.parent is not None and self._last_child[ref.parent] == index:
                del activations[ref.parent]
            x = fragment(entry(x))
            if index in self._last_child:
                activations[index] = x
            for number, tap in enumerate(recipe.taps):
                if tap.fragment == index:
                    vectors[number] = self.taps[number](x)
        if recipe.average is None:
            return torch.cat([vectors[number] for number in range(len(recipe.taps))], dim=-1)
        members = [torch.cat([vectors[number] for number in member], dim=-1) for member in recipe.average.members]
        if recipe.average.with_heads:
            members = [head(member) for head, member in zip(self.heads, members, strict=True)]
        together = torch.stack([member.log_softmax(-1) for member in members])
        if recipe.average.mean == "arithmetic":
            return together.logsumexp(0) - math.log(len(members))
        return together.mean(0).log_softmax(-1)

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, trust_factory: bool = False) -> StitchedNetwork:
        """Rebuild a recipe's structure, with random weights, which `load_state_dict` replaces; no file is read.

        Args:
            recipe: The recipe.
            trust_factory: Allow importing and calling the factory that a "python:" source names.

        Raises:
            RecipeError: If a source cannot be rebuilt, or its architecture no longer has the recipe's cuts.
        """
        graphs = {}
        for ref in (recipe.source(name) for name in dict.fromkeys(fragment.source for fragment in recipe.fragments)):
            network = build_architecture(ref, trust_factory=trust_factory)
            graphs[ref.name] = CutGraph(network, view_size(ref.preprocessing, recipe.input_size))
        return assemble(recipe, graphs)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        details: CardDetails | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write all that `from_pretrained` needs, and a card: config.json, model.safetensors, README.md, a picture.

        Only the fragments are written, weights that several of them share once.

        Args:
            directory: The folder; made if it does not exist.
            details: What the card says beyond the recipe.
            name: The card's title; None: the folder's name.
            overwrite: Replace files of these names.

        Raises:
            RecipeError: If a source was given as a live module, which nobody else could build.
            StitchError: If the folder holds such files already.
        """
        task = None if self.recipe.average is None else "multiclass"
        subject = CardSubject(self.recipe, self.describe(), "StitchedNetwork", task)
        save_folder(
            {"network": self},
            directory,
            subject,
            num_outputs=self.num_features,
            details=details,
            name=name,
            overwrite=overwrite,
        )

    @classmethod
    def from_pretrained(cls, where: str | Path, *, trust_factory: bool = False) -> StitchedNetwork:
        """Load what `save_pretrained` or `publish` wrote; no source and, from a folder, no network is needed.

        Of a saved classifier it takes the network and leaves the head. Nothing is unpickled.

        Args:
            where: A folder, or a hub repository "ORG/NAME" or "ORG/NAME@REVISION".
            trust_factory: Allow importing and calling the factory that a "python:" source names.

        Raises:
            SourceError: If the folder or repository cannot be found.
            RecipeError: If config and weights do not fit each other, or a source cannot be built.
            StitchError: If a file is missing.
        """
        folder = open_pretrained(where)
        parts: Any = folder.load(
            lambda: nn.ModuleDict({"network": cls.from_recipe(folder.recipe, trust_factory=trust_factory)}),
            trust_factory=trust_factory,
        )
        network: StitchedNetwork = parts["network"]
        return network

    @property
    def num_features(self) -> int:
        """Width of the output."""
        return self.recipe.num_features

    def describe(self) -> str:
        """The composition in words: fragments, stitches and where they live, taps, parameters, MACs, scores."""
        recipe, average = self.recipe, self.recipe.average
        kind = (
            f"Ensemble of {len(average.members)} networks ({average.mean} mean)," if average else "Stitched network of"
        )
        lines = [f"{kind} {len(recipe.fragments)} fragment{'s' * (len(recipe.fragments) > 1)}"]
        numbered = not recipe.is_chain
        for index, (ref, fragment) in enumerate(zip(recipe.fragments, self.fragments, strict=True)):
            if ref.stitch is not None:
                lines.append(f"    stitch {_stitch_in_words(ref.stitch)}")
            place = f"{index + 1}. " if numbered else ""
            behind = "" if not numbered or ref.parent in (None, index - 1) else f", behind {ref.parent + 1}"
            params = sum(p.numel() for p in fragment.parameters())
            lines.append(f"  {place}{ref}{behind}, {params / 1e6:.3f} M parameters")
            for number, tap in enumerate(recipe.taps):
                if tap.fragment == index and tap.statistics:
                    is_averaged = getattr(self.taps[number], "format", "vector") != "vector"
                    lines.append("    ends early here" + (", averaged over positions" if is_averaged else ""))
                elif tap.fragment == index and numbered:
                    lines.append(f"    read here: {tap.num_features} features")
        lines.append(self._total())
        if recipe.healed:
            lines.append("  healed behind its stitches")
        for reason in dict.fromkeys(recipe.unhealed.values()):
            layers = [layer for layer, why in recipe.unhealed.items() if why == reason]
            lines.append(f"  not healed ({reason}): {', '.join(layers)}")
        shown = ("params", "macs", "activation_bytes")
        scores = [f"{name} {value:.4g}" for name, value in recipe.scores.items() if name not in shown]
        if scores:
            lines.append("  " + ", ".join(scores))
        return "\n".join(lines)

    def _total(self) -> str:
        total = f"  {sum(p.numel() for p in self.parameters()) / 1e6:.3f} M parameters"
        if self.recipe.share_weights:
            holders = Counter(p for fragment in self.fragments for p in fragment.parameters())
            shared = sum(p.numel() for p, count in holders.items() if count > 1)
            total += f" ({shared / 1e6:.3f} M of them shared by several fragments)"
        macs, activations = (self.recipe.scores.get(name) for name in ("macs", "activation_bytes"))
        total += "" if macs is None else f", {macs / 1e6:.1f} M MACs"
        total += "" if activations is None else f", {activations / 1e6:.3g} MB of activations"
        return total + f" at {_size(self.recipe.input_size[1:])}"


def assemble(
    recipe: Recipe,
    graphs: Mapping[str, CutGraph],
    stitches: Sequence[Stitch | None] | None = None,
    tensors: Sequence[Mapping[str, Tensor]] | None = None,
    heads: Sequence[nn.Module] | None = None,
) -> StitchedNetwork:
    """Build a composition from cut sources and fitted stitches; folds what the recipe says is folded.

    Args:
        recipe: The structure.
        graphs: The cut graph of each source, by name. Their parameters are copied: once for each fragment, or, where
            the recipe shares weights, once for all fragments of the source.
        stitches: What leads into each fragment, explicit where it is fitted; None: all numbers are zero.
        tensors: For each fragment the parameters and buffers, by their names in the source, that differ from its.
        heads: The members' heads, where the recipe averages members that have one; None: their numbers are zero.

    Raises:
        RecipeError: If a source's graph lacks a cut of the recipe, or a fold is not possible.
    """
    stitches = stitches or [None] * len(recipe.fragments)
    tensors = tensors or [{}] * len(recipe.fragments)
    copies: dict[str, dict[int, Any]] = {}
    entries: list[nn.Module] = []
    fragments: list[fx.GraphModule] = []
    try:
        for ref, stitch, changed in zip(recipe.fragments, stitches, tensors, strict=True):
            fragment = graphs[ref.source].fragment(ref.start, ref.end, share=True)
            memo = copies.setdefault(ref.source, {}) if recipe.share_weights else {}
            fragments.append(with_tensors(copy_module(fragment, memo), changed))
            if ref.parent is None:
                entries.append(Preprocess(recipe.source(ref.source).preprocessing))
            elif ref.stitch is None:
                entries.append(nn.Identity())
            else:
                entries.append(_place_stitch(ref.stitch, stitch, fragments[ref.parent], fragments[-1]))
        taps = [_tap_module(tap, recipe, graphs) for tap in recipe.taps]
    except CutError as error:
        raise RecipeError(f"The recipe does not fit its sources: {error}") from error
    network = StitchedNetwork(recipe, entries, fragments, taps, _empty_heads(recipe) if heads is None else heads)
    return network.to(reference_tensor(network.fragments).device).eval()


def _is_traced(images: Any) -> bool:
    """Whether images have no values: while a graph is recorded, or without memory."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or isinstance(images, FakeTensor | fx.Proxy) or getattr(images, "is_meta", False)


def _tap_module(tap: Tap, recipe: Recipe, graphs: Mapping[str, CutGraph]) -> nn.Module:
    ref = recipe.fragments[tap.fragment]
    graph = graphs[ref.source]
    channels = graph.output_features() if ref.end is None else graph.find(ref.end).channels
    if channels != tap.channels:
        raise RecipeError(f"The recipe reads {tap.channels} channels at the end of {ref}; its source has {channels}.")
    return GlobalAverage(graph.find(str(ref.end))) if tap.statistics else nn.Identity()


def _empty_heads(recipe: Recipe) -> list[nn.Module]:
    average = recipe.average
    if average is None or not average.with_heads:
        return []
    widths = [sum(recipe.taps[tap].num_features for tap in member) for member in average.members]
    return [RidgeHead(width, average.num_classes) for width in widths]


def _place_stitch(spec: StitchSpec, stitch: Stitch | None, before: fx.GraphModule, after: fx.GraphModule) -> Stitch:
    """The joint of two fragments, with its numbers in itself, or folded into a neighbour, which changes in place."""
    joint = Stitch(spec)
    if stitch is None or stitch.weight is None:
        stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
    if spec.placement == "explicit":
        joint.load_state_dict(stitch.state_dict())
        return joint
    if joint.prefix is not None and stitch.prefix is not None:
        joint.prefix.copy_(stitch.prefix)
    if spec.placement == "producer":
        fold_into_producer(before, stitch)
    else:
        fold_into_consumer(after, stitch)
    return joint


def _stitch_in_words(spec: StitchSpec) -> str:
    where = {
        "explicit": "a layer of its own",
        "producer": "folded into the layer before",
        "consumer": "folded into the layer behind",
    }[spec.placement]
    sizes = (
        f"{spec.in_channels}x{_size(spec.in_size)} -> {spec.out_channels}x{_size(spec.out_size)} "
        f"({spec.in_format} -> {spec.out_format})"
    )
    measured = (("CKA", spec.cka), ("held-out R2", spec.r2))
    scores = ", ".join(f"{name} {value:.3f}" for name, value in measured if value is not None)
    return f"{sizes}, {where}" + (f"; {scores}" if scores else "")


def _size(size: Sequence[int] | None) -> str:
    return "1" if size is None else "x".join(map(str, size))
