"""The stitched network: a tree of fragments and stitches with taps, as one `nn.Module` that takes images in [0, 1]."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public home

from lightning_stitch.cutting import CutGraph, copy_module, fuse, reference_tensor, with_tensors
from lightning_stitch.errors import CutError, RecipeError
from lightning_stitch.heads import RidgeHead, StagedHead
from lightning_stitch.hub import CardDetails, CardSubject, open_pretrained, save_folder
from lightning_stitch.recipe import Recipe, StitchSpec, Tap
from lightning_stitch.sources import Preprocess, build_architecture, view_size
from lightning_stitch.stitching import Reading, Stitch, check_images, fold_into_consumer, fold_into_producer

ImageSize = tuple[int, int] | None
"""(height, width) to which images are resized for a source; None: they keep the recipe's."""


class StitchedNetwork(nn.Module):
    """A composition of fragments of several sources: a chain, an early exit, sources side by side, or an ensemble.

    Its forward takes images (batch, channels, height, width), float, in [0, 1], not normalised: the first batch with
    gradients is checked, and the first one without after each `eval()`; others cost nothing. It gives what its taps
    read, side by side (batch, num_features): means and standard deviations over the positions of what it passes, and
    its ends' vectors. An average of members gives log-probabilities (batch, classes), which serve as logits.

    Attributes:
        recipe: Its structure.
        entries: What leads into each fragment: its source's preprocessing, a `Stitch`, or nothing (`nn.Identity`).
        fragments: The fragments, parents first; their parameters are their own, or shared among the fragments of one
            source where the recipe says so.
        taps: What reads each tap's activation.
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
        self._stages = recipe.fragment_stages
        self._order = sorted(range(len(recipe.fragments)), key=lambda index: self._stages[index])
        parents = [(recipe.fragments[index].parent, index) for index in self._order]
        # An activation is let go of as soon as its last fragment has begun.
        self._last_child = {parent: index for parent, index in parents if parent is not None}
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
        self._check_once(images)
        recipe = self.recipe
        vectors: dict[int, Tensor] = {}
        self._run(self._order, images, {}, vectors)
        if recipe.average is None:
            return torch.cat([vectors[number] for number in range(len(recipe.taps))], dim=-1)
        members = [torch.cat([vectors[number] for number in member], dim=-1) for member in recipe.average.members]
        if recipe.average.with_heads:
            members = [head(member) for head, member in zip(self.heads, members, strict=True)]
        together = torch.stack([member.log_softmax(-1) for member in members])
        if recipe.average.mean == "arithmetic":
            return together.logsumexp(0) - math.log(len(members))
        return together.mean(0).log_softmax(-1)

    def in_stages(self, images: Tensor, head: StagedHead) -> tuple[Tensor, Tensor]:
        """What a head of its stages says of images in [0, 1], each of which runs until a stage is sure of it.

        The same as of whole readouts, but what an image does not need does not run. Of a batch all run as far as the
        first stage; the unsure go on from the activations that are there.

        Args:
            images: (batch, channels, height, width).
            head: Fitted for this network's recipe, which has stages.

        Returns:
            Logits or numbers (batch, classes), and the stage at which each image stopped (batch,).
        """
        assert self.recipe.stages is not None
        self._check_once(images)
        activations: dict[int, Tensor] = {}
        features: Tensor | None = None
        rows = torch.arange(len(images), device=images.device)
        answers, places, stopped = [], [], []
        for stage in range(len(self.recipe.stages.taps)):
            features = self.run_stage(stage, images, features, activations)
            outputs = head.heads[stage](features)
            sure = head.is_sure(stage, outputs)
            answers.append(head.answer(outputs[sure]))
            places.append(rows[sure])
            stopped.append(torch.full_like(places[-1], stage))
            if bool(sure.all()):
                break
            unsure = ~sure
            rows, images, features = rows[unsure], images[unsure], features[unsure]
            activations = {index: x[unsure] for index, x in activations.items()}
        order = torch.cat(places).argsort()
        return torch.cat(answers)[order], torch.cat(stopped)[order]

    def run_stage(
        self, stage: int, images: Tensor | None, features: Tensor | None, activations: dict[int, Tensor]
    ) -> Tensor:
        """Run a stage's fragments behind those of the stages before it.

        Args:
            stage: Which one.
            images: In [0, 1]; None where the stage reads none (`reads_images`).
            features: What the taps of the stages before it gave (batch, features); None: it is the first.
            activations: What it goes on from, by fragment (`carried_into`); becomes what the next one does.

        Returns:
            What all taps so far gave (batch, features).
        """
        vectors: dict[int, Tensor] = {}
        self._run([index for index in self._order if self._stages[index] == stage], images, activations, vectors)
        read = [vectors[number] for number in sorted(vectors)]
        return torch.cat(read if features is None else [features, *read], dim=-1)

    def reads_images(self, stage: int) -> bool:
        """Whether a fragment of a stage begins at the image."""
        roots = (index for index, ref in enumerate(self.recipe.fragments) if ref.parent is None)
        return any(self._stages[index] == stage for index in roots)

    def carried_into(self, stage: int) -> list[int]:
        """The fragments before a stage whose activations it or a later one goes on from."""
        last_uses = {index: self._stages[child] for index, child in self._last_child.items()}
        return [index for index, last in sorted(last_uses.items()) if self._stages[index] < stage <= last]

    def _check_once(self, images: Tensor) -> None:
        if torch.is_grad_enabled() not in self._checked and not is_traced(images):
            self.check_images(images)
            self._checked.add(torch.is_grad_enabled())

    def _run(
        self, order: Iterable[int], images: Tensor | None, activations: dict[int, Tensor], vectors: dict[int, Tensor]
    ) -> None:
        """Run fragments, by their numbers: keep the activations that others go on from, and what taps read."""
        for index in order:
            ref = self.recipe.fragments[index]
            x = images if ref.parent is None else activations[ref.parent]
            if ref.parent is not None and self._last_child[ref.parent] == index:
                del activations[ref.parent]
            x = self.fragments[index](self.entries[index](x))
            if index in self._last_child:
                activations[index] = x
            for number, tap in enumerate(self.recipe.taps):
                if tap.fragment == index:
                    vectors[number] = self.taps[number](x)

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
            sizes = [size for name, size in sizes_of(recipe) if name == ref.name]
            shape = recipe.input_size if None in sizes else (recipe.input_size[0], *(sizes[0] or ()))
            graphs[ref.name] = CutGraph(network, view_size(ref.preprocessing, shape))
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

    def export(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write it as .onnx or .pt2, images in [0, 1] -> features; as `StitchedClassifier.export`."""
        from lightning_stitch.networks.exporting import export_network  # which needs this module

        return export_network(self, path, overwrite=overwrite)

    def fused(self) -> StitchedNetwork:
        """A copy for inference, faster: BatchNorm folded into convolutions, these channels-last; equal to rounding."""
        network = copy_module(self).eval()
        fragments: Any = network.fragments
        network.fragments = nn.ModuleList([fuse(fragment) for fragment in fragments])
        return network.eval()  # with what took the place of folded layers

    @property
    def num_features(self) -> int:
        """Width of the output."""
        return self.recipe.num_features

    def describe(self) -> str:
        """The composition in words: fragments, stitches and where they live, taps, parameters, MACs, scores."""
        recipe, average = self.recipe, self.recipe.average
        runs = recipe.runs
        kind = (
            f"Ensemble of {len(average.members)} networks ({average.mean} mean)," if average else "Stitched network of"
        )
        lines = [f"{kind} {len(runs)} fragment{'s' * (len(runs) > 1)}"]
        numbers = {index: number for number, run in enumerate(runs) for index in run.fragments}
        for number, run in enumerate(runs):
            if run.ref.stitch is not None:
                lines.append(f"    stitch {_stitch_in_words(run.ref.stitch)}")
            place = "" if recipe.is_chain else f"{number + 1}. "
            parent = None if run.ref.parent is None else numbers[run.ref.parent]
            behind = "" if recipe.is_chain or parent in (None, number - 1) else f", behind {parent + 1}"
            params = sum(p.numel() for p in _parameters(self.fragments[index] for index in run.fragments))
            lines.append(f"  {place}{run.ref}{behind}, {params / 1e6:.3f} M parameters")
            taps = [tap for tap in recipe.taps if tap.fragment in run.fragments]
            if taps:
                lines.append("    " + _taps_in_words(taps, recipe))
        lines.append(self._total())
        lines += _stages_in_words(recipe)
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
        return total + f" at {_size(self.recipe.input_size[1:])}; gives {self.num_features} features"


def sizes_of(recipe: Recipe) -> list[tuple[str, ImageSize]]:
    """The source of each fragment, and the size that it sees images in."""
    sizes: list[tuple[str, ImageSize]] = []
    for ref in recipe.fragments:
        # Behind a stitch a source goes on at the size that the stitch was fitted for, the recipe's.
        goes_on = ref.parent is not None and ref.stitch is None
        sizes.append((ref.source, sizes[ref.parent or 0][1] if goes_on else ref.image_size))
    return sizes


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
        graphs: The cut graph of each source, by name, at any size. Their parameters are copied: once for each fragment,
            or, where the recipe shares weights, once for all fragments of the source.
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
        at_sizes = {key: _graph_at(recipe, *key, graphs[key[0]]) for key in dict.fromkeys(sizes_of(recipe))}
        of_fragments = [at_sizes[key] for key in sizes_of(recipe)]
        for ref, graph, stitch, changed in zip(recipe.fragments, of_fragments, stitches, tensors, strict=True):
            fragment = graph.fragment(ref.start, ref.end, share=True)
            memo = copies.setdefault(ref.source, {}) if recipe.share_weights else {}
            fragments.append(with_tensors(copy_module(fragment, memo), changed))
            if ref.parent is None:
                entries.append(Preprocess(recipe.source(ref.source).preprocessing, ref.image_size))
            elif ref.stitch is None:
                entries.append(nn.Identity())
            else:
                entries.append(_place_stitch(ref.stitch, stitch, fragments[ref.parent], fragments[-1]))
        taps = [_tap_module(tap, recipe, of_fragments[tap.fragment]) for tap in recipe.taps]
    except CutError as error:
        raise RecipeError(f"The recipe does not fit its sources: {error}") from error
    network = StitchedNetwork(recipe, entries, fragments, taps, _empty_heads(recipe) if heads is None else heads)
    return network.to(reference_tensor(network.fragments).device).eval()


def _graph_at(recipe: Recipe, name: str, size: ImageSize, graph: CutGraph) -> CutGraph:
    """A source's graph for images of a size."""
    shape = recipe.input_size if size is None else (recipe.input_size[0], *size)
    return graph.at(view_size(recipe.source(name).preprocessing, shape))


def is_traced(images: Any) -> bool:
    """Whether images have no values: while a graph is recorded, or without memory."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or isinstance(images, FakeTensor | fx.Proxy) or getattr(images, "is_meta", False)


def _tap_module(tap: Tap, recipe: Recipe, graph: CutGraph) -> nn.Module:
    ref = recipe.fragments[tap.fragment]
    cut = None if ref.end is None else graph.find(ref.end)
    channels = graph.output_features() if cut is None else cut.channels
    if channels != tap.channels or (cut is not None and tap.prefix_tokens not in (0, cut.num_prefix_tokens)):
        raise RecipeError(f"The recipe reads {tap.channels} channels at the end of {ref}; its source has {channels}.")
    return Reading(cut, tap.statistics)


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


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters of modules, each once."""
    return {parameter for module in modules for parameter in module.parameters()}


def _taps_in_words(taps: Sequence[Tap], recipe: Recipe) -> str:
    """What is read of a run, and which of it decides, as "read at 17 cuts: 4880 features; blocks.5 .31, ..."."""
    width = sum(tap.num_features for tap in taps)
    names = {tap: recipe.fragments[tap.fragment].end or "output" for tap in taps}
    words = f"read at {names[taps[0]] if len(taps) == 1 else f'{len(taps)} cuts'}: {width} features"
    shares = {names[tap]: tap.share for tap in taps if tap.share is not None}
    if shares:
        deciding = [(name, share) for name, share in shares.items() if share >= 0.005]
        most = sorted(deciding, key=lambda item: -item[1])[:3]
        words += "; of what decides " + ", ".join(f"{share:.0%} {name}" for name, share in most)
    return words


def _stages_in_words(recipe: Recipe) -> list[str]:
    """Where images may stop, and at how many MACs how many do."""
    stages = recipe.stages
    if stages is None:
        return []
    lines = ["  stops when sure:"]
    figures = stages.figures or ({},) * len(stages.taps)
    for count, macs, share, known in zip(stages.taps, stages.macs, stages.stopping, figures, strict=True):
        end = recipe.fragments[recipe.taps[count - 1].fragment]
        words = f"    {share:.0%} of images behind {end.source} {end.end or 'output'}, {macs / 1e6:.1f} M MACs"
        if "loo_accuracy" in known:
            words += f"; of all images it is right on {known['loo_accuracy']:.3f}"
        if "confidence_auroc" in known:
            words += f", knows when by AUROC {known['confidence_auroc']:.3f}"
        lines.append(words)
    least, most = (stages.points[place].mean_macs / 1e6 for place in (0, -1))
    mean = stages.chosen.mean_macs / 1e6
    return [*lines, f"    {mean:.1f} M MACs on average; can be set from {least:.1f} to {most:.1f} M"]


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
