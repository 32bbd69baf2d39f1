"""Ensembles: several networks of one search as one module, what they have in common computed and held once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from lightning_stitch.cutting import CutGraph, copied, reference_tensor, with_tensors
from lightning_stitch.errors import CutError, RecipeError
from lightning_stitch.heads import RidgeHead
from lightning_stitch.hub import CardDetails, CardSubject, open_folder, save_folder
from lightning_stitch.networks.network import placed_stitch
from lightning_stitch.recipe import EnsembleRecipe, FragmentRef, Member
from lightning_stitch.sources import Preprocess, build_architecture, view_size
from lightning_stitch.stitching import GlobalAverage, Stitch


class Ensemble(nn.Module):
    """Several stitched networks whose outputs are averaged; what they begin with alike runs once.

    Its forward takes images (batch, channels, height, width), float, in [0, 1], and gives log-probabilities
    (batch, classes), which serve as logits: their softmax is the average. "arithmetic": of the members' probabilities;
    "geometric": of their log-probabilities, normalised again.

    Build one with `ensemble`, or `Ensemble.from_recipe` (structure only).

    Attributes:
        recipe: Its structure.
        entries: What leads into each branch: a source's preprocessing, a stitch, or nothing.
        fragments: The fragment of each branch.
        pools: What averages each member's last activation over its positions, or nothing.
        heads: Each member's head, or nothing.
    """

    def __init__(
        self,
        recipe: EnsembleRecipe,
        entries: Sequence[nn.Module],
        fragments: Sequence[nn.Module],
        pools: Sequence[nn.Module],
        heads: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.entries = nn.ModuleList(entries)
        self.fragments = nn.ModuleList(fragments)
        self.pools = nn.ModuleList(pools)
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (batch, classes) for images in [0, 1]."""
        given: list[Tensor] = []
        for branch, entry, fragment in zip(self.recipe.branches, self.entries, self.fragments, strict=True):
            given.append(fragment(entry(images if branch.parent is None else given[branch.parent])))
        said = []
        for member, pool, head in zip(self.recipe.members, self.pools, self.heads, strict=True):
            said.append(head(pool(given[member.branch])).log_softmax(-1))
        together = torch.stack(said)
        if self.recipe.mean == "arithmetic":
            return together.logsumexp(0) - math.log(len(said))
        return together.mean(0).log_softmax(-1)

    @classmethod
    def from_recipe(cls, recipe: EnsembleRecipe, *, trust_factory: bool = False) -> Ensemble:
        """Rebuild a recipe's structure, with random weights: needs no network, no files and no source weights.

        Load the numbers with `load_state_dict` afterwards.

        Args:
            recipe: The recipe.
            trust_factory: Allow importing and calling the factory that a "python:" source names.

        Raises:
            RecipeError: If a source cannot be rebuilt, or its architecture no longer has the recipe's cuts.
        """
        graphs = {}
        used = {branch.fragment.source for branch in recipe.branches}
        for ref in recipe.sources:
            if ref.name not in used:
                continue
            network = build_architecture(ref, trust_factory=trust_factory)
            graphs[ref.name] = CutGraph(network, view_size(ref.preprocessing, recipe.input_size))
        heads = [
            nn.Identity() if m.in_features is None else RidgeHead(m.in_features, recipe.num_classes)
            for m in recipe.members
        ]
        return _assembled(recipe, graphs, heads)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        details: CardDetails | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write all that `from_pretrained` needs, and a card, as `StitchedNetwork.save_pretrained`."""
        subject = CardSubject(self.recipe, self.describe(), "Ensemble", "multiclass")
        width = self.recipe.num_classes
        save_folder(
            {"network": self}, directory, subject, num_outputs=width, details=details, name=name, overwrite=overwrite
        )

    @classmethod
    def from_pretrained(cls, where: str | Path, *, trust_factory: bool = False) -> Ensemble:
        """Load what `save_pretrained` or `publish` wrote, as `StitchedNetwork.from_pretrained`."""
        folder = open_folder(where, loader="Ensemble", also="classifier")
        recipe = folder.recipe
        if not isinstance(recipe, EnsembleRecipe):
            raise RecipeError(f"{str(where)!r} holds one network; StitchedClassifier.from_pretrained loads it.")
        parts = folder.load(
            lambda: nn.ModuleDict({"network": cls.from_recipe(recipe, trust_factory=trust_factory)}),
            trust_factory=trust_factory,
        )
        network: Ensemble = parts.get_submodule("network")  # type: ignore[assignment]
        return network

    def describe(self) -> str:
        """The members in words, and how many parameters they hold together."""
        params = sum(p.numel() for p in self.parameters())
        lines = [
            f"Ensemble of {len(self.recipe.members)} networks, {self.recipe.mean} mean, {params / 1e6:.3f} M parameters"
        ]
        for member in self.recipe.members:
            ways: list[FragmentRef] = []
            for branch in self.recipe.way_to(member):
                if ways and branch.stitch is None:
                    ways[-1] = FragmentRef(branch.fragment.source, ways[-1].start, branch.fragment.end)
                else:
                    ways.append(branch.fragment)
            words = " -> ".join(f"{way.source}: {way.start or 'image'} .. {way.end or 'output'}" for way in ways)
            lines.append(f"  {words}" + (" (ends early)" if member.pooled else ""))
        return "\n".join(lines)


def _assembled(
    recipe: EnsembleRecipe,
    graphs: Mapping[str, CutGraph],
    heads: Sequence[nn.Module],
    stitches: Sequence[Stitch | None] | None = None,
    tensors: Sequence[Mapping[str, Tensor]] | None = None,
) -> Ensemble:
    fragments: list[fx.GraphModule] = []
    entries: list[nn.Module] = []
    try:
        for number, branch in enumerate(recipe.branches):
            ref = branch.fragment
            fragment = copied(graphs[ref.source].fragment(ref.start, ref.end, share=True))
            fragments.append(with_tensors(fragment, {} if tensors is None else tensors[number]))
            if branch.parent is None:
                entries.append(Preprocess(recipe.source(ref.source).preprocessing))
            elif branch.stitch is None:
                entries.append(nn.Identity())
            else:
                stitch = None if stitches is None else stitches[number]
                entries.append(placed_stitch(branch.stitch, stitch, fragments[branch.parent], fragments[number]))
        pools = [_pool(recipe, member, graphs) for member in recipe.members]
    except CutError as error:
        raise RecipeError(f"The recipe does not fit its sources: {error}") from error
    network = Ensemble(recipe, entries, fragments, pools, heads)
    return network.to(reference_tensor(network.fragments).device).eval()


def _pool(recipe: EnsembleRecipe, member: Member, graphs: Mapping[str, CutGraph]) -> nn.Module:
    if not member.pooled:
        return nn.Identity()
    last = recipe.branches[member.branch].fragment
    return GlobalAverage.of(graphs[last.source].find(str(last.end)))
