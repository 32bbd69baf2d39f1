"""Ensembles: several networks of one search as one module, what they have in common computed and held once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from lightning_stitch.cutting.copies import copied, reference_tensor, with_tensors
from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.errors import CalibrationError, CutError, RecipeError, StitchError
from lightning_stitch.heads.ridge import RidgeHead, fit_ridge_head
from lightning_stitch.hub.card import CardDetails, CardSubject
from lightning_stitch.hub.loading import open_folder
from lightning_stitch.hub.saving import save_folder
from lightning_stitch.network import placed_stitch
from lightning_stitch.pool import Pool
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Branch, EnsembleRecipe, FragmentRef, Mean, Member, SourceRef
from lightning_stitch.results import Ranked, SearchResult
from lightning_stitch.sources.source import build_architecture
from lightning_stitch.sources.views import Preprocess, view_size
from lightning_stitch.stitching.candidates import Candidate, Step
from lightning_stitch.stitching.images import Batch
from lightning_stitch.stitching.segments import Segmented
from lightning_stitch.stitching.stitches import GlobalAverage, Stitch


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


def ensemble(
    pool: Pool,
    candidates: SearchResult | Sequence[Candidate | Ranked],
    train: Iterable[Batch] | None = None,
    *,
    top: int = 3,
    mean: Mean = "arithmetic",
    heads: Sequence[nn.Module] | None = None,
    num_classes: int | None = None,
) -> Ensemble:
    """One module of several candidates of one search, fragments and stitches that they share computed and held once.

    Two candidates share all pieces from the image up to the first that differs: another piece, another stitch before
    it, a stitch folded into it, or other numbers (refinements). Each gets a head of its own.

    Args:
        pool: The pool that was searched.
        candidates: A search's result, of which the best are taken, or candidates.
        train: Batches of (images, labels), on which each member's closed-form head is fitted.
        top: How many of a result's candidates.
        mean: "arithmetic" or "geometric".
        heads: A `RidgeHead` of each candidate instead; they are copied.
        num_classes: Number of classes of the fitted heads; None: as many as the labels say.

    Raises:
        StitchError: If there are no candidates, the mean is unknown, or there is not one head for each candidate.
        CalibrationError: If members need heads and there are neither heads nor labels.

    Example:
        >>> network = ensemble(pool, result, train_loader, top=5)  # doctest: +SKIP
        >>> network(images).softmax(-1)  # doctest: +SKIP
    """
    if mean not in get_args(Mean):
        raise StitchError(f"mean must be one of {get_args(Mean)}; found {mean!r}.")
    given = candidates.ranked[:top] if isinstance(candidates, SearchResult) else candidates
    members = [c.candidate if isinstance(c, Ranked) else c for c in given]
    if not members:
        raise StitchError("An ensemble needs at least one candidate; found none.")
    if heads is None:
        heads = _fitted_heads(pool, members, train, num_classes)
    if len(heads) != len(members):
        raise StitchError(f"Each candidate needs a head; found {len(members)} candidates and {len(heads)} heads.")
    widths = {len(head.weight) if isinstance(head, RidgeHead) else None for head in heads}
    if (None in widths and len(widths) > 1) or not all(isinstance(h, RidgeHead | nn.Identity) for h in heads):
        raise StitchError(f"heads= are RidgeHeads of as many classes; found {[type(head).__name__ for head in heads]}.")
    if len(widths) > 1:
        raise StitchError(f"The heads of an ensemble have as many classes; found {sorted(map(str, widths))}.")
    (width,) = widths
    tree = _tree(members, pool.parts)
    recipe = EnsembleRecipe(
        sources=tuple(_sources(tree, pool.parts)),
        branches=tuple(node.branch(pool.parts) for node in tree),
        members=tuple(
            Member(
                branch=next(number for number, node in enumerate(tree) if index in node.ends),
                pooled=member.pool is not None,
                in_features=head.weight.shape[1] if isinstance(head, RidgeHead) else None,
            )
            for index, (member, head) in enumerate(zip(members, heads, strict=True))
        ),
        mean=mean,
        num_classes=pool.parts[0].graph.output_features() if width is None else width,
        input_size=pool.image_shape,
    )
    graphs = {part.name: part.graph for part in pool.parts}
    copies = [copied(head) for head in heads]
    return _assembled(recipe, graphs, copies, [n.stitch for n in tree], [n.tensors for n in tree])


def _fitted_heads(
    pool: Pool, members: Sequence[Candidate], train: Iterable[Batch] | None, num_classes: int | None
) -> list[nn.Module]:
    if train is None:
        if pool.settings.until == "output":
            return [nn.Identity() for _ in members]
        raise CalibrationError("The members of an ensemble need heads: give train=, batches of (images, labels).")
    outcomes, labels = pool.outcomes(members, train, progress=Silent())
    if labels is None:
        raise CalibrationError("train= must be batches of (images, labels); found images alone.")
    count = num_classes or int(labels.max()) + 1
    return [fit_ridge_head(outcome.features, labels, num_classes=count)[0] for outcome in outcomes]


@dataclass(slots=True)
class _Node:
    """Pieces [first, last) of one source that run for the same members."""

    parent: int | None
    source: int
    first: int
    last: int
    stitch: Stitch | None
    step: Step
    ends: list[int] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.step.tensors

    def branch(self, parts: Sequence[Segmented]) -> Branch:
        part = parts[self.source]
        names = [None, *(cut.name for cut in part.cuts), part.end]
        fragment = FragmentRef(part.name, names[self.first], names[self.last])
        return Branch(self.parent, fragment, None if self.stitch is None else self.step.spec)


def _tree(members: Sequence[Candidate], parts: Sequence[Segmented]) -> list[_Node]:
    """The members' pieces, those that are the same merged, and runs of pieces without a fork joined to one node."""
    pieces: list[_Node] = []
    known: dict[tuple[Any, ...], int] = {}
    for index, member in enumerate(members):
        parent: int | None = None
        for step, after in zip(member.steps, (*member.steps[1:], None), strict=True):
            for piece in range(step.first, step.last):
                stitch = step.stitch if piece == step.first else None
                folded = after is not None and piece + 1 == step.last and _is_folded_before(after)
                # Stitches and refinements are known by their objects: a search makes each only once.
                own = (id(stitch), id(step.tensors) if step.tensors else None)
                key = (parent, step.source, piece, *own, id(after.stitch) if after is not None and folded else None)
                if key not in known:
                    known[key] = len(pieces)
                    pieces.append(_Node(parent, step.source, piece, piece + 1, stitch, step))
                parent = known[key]
        assert parent is not None
        pieces[parent].ends.append(index)
    return _joined(pieces)


def _is_folded_before(step: Step) -> bool:
    return step.spec is not None and step.spec.placement == "producer"


def _joined(pieces: Sequence[_Node]) -> list[_Node]:
    children = [sum(other.parent == number for other in pieces) for number in range(len(pieces))]
    tree: list[_Node] = []
    place: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        before = piece.parent
        if before is not None and piece.stitch is None and children[before] == 1 and not pieces[before].ends:
            place[number] = place[before]
            tree[place[number]].last = piece.last
            tree[place[number]].ends = piece.ends
            continue
        place[number] = len(tree)
        piece.parent = None if before is None else place[before]
        tree.append(piece)
    return tree


def _sources(tree: Sequence[_Node], parts: Sequence[Segmented]) -> list[SourceRef]:
    return [parts[index].source.ref for index in dict.fromkeys(node.source for node in tree)]


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
