"""Sources taken apart at their cuts, and what any composition of their pieces costs, before anything is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from lightning_stitch._spool import Keeping
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.errors import BudgetError, CutError, StitchError
from lightning_stitch.folding import choose_placement, stitch_cost
from lightning_stitch.functional import Estimator
from lightning_stitch.graph import Cut, CutGraph, Granularity
from lightning_stitch.preprocessing import Preprocess, view_size
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.sources import Source
from lightning_stitch.stitches import is_bridgeable, stitch_spec

# Below glibc's largest threshold (32 MB) for keeping freed memory instead of giving it back.
_CHUNK_BYTES = 20 * 2**20


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How activations are sampled and scored.

    Attributes:
        granularity: Which cuts are offered (`CutGraph.cuts`): a word or a list of cut names for all sources, or a
            mapping from a source's name to its own; sources that it leaves out offer their "blocks".
        estimator: Of CKA, "debiased" or "biased" (the paper's).
        rows_per_image: Most rows that are sampled of one image at one cut.
        until: Where a network ends: at the "features" that its last source's classifier reads, or at its "output".
        seed: Of the sampled positions.
        keep_activations: Where activations of the calibration images wait to be carried on while a search lasts: on
            "disk" (an unnamed temporary file, so that memory is rows x channels at any image size), or in "memory".

    Raises:
        StitchError: If a word is unknown or a number is not positive.
    """

    granularity: Granularity | Sequence[str] | Mapping[str, Granularity | Sequence[str]] = "blocks"
    estimator: Estimator = "debiased"
    rows_per_image: int = 32
    until: str = "features"
    seed: int = 0
    keep_activations: Keeping = "disk"

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        if self.until not in ("features", "output"):
            raise StitchError(f"until must be 'features' or 'output'; found {self.until!r}.")
        if self.estimator not in get_args(Estimator):
            raise StitchError(f"estimator must be one of {get_args(Estimator)}; found {self.estimator!r}.")
        if self.keep_activations not in get_args(Keeping):
            raise StitchError(f"keep_activations must be one of {get_args(Keeping)}; found {self.keep_activations!r}.")
        if self.rows_per_image < 1:
            raise StitchError(f"rows_per_image must be at least 1; found {self.rows_per_image}.")

    def granularity_of(self, source: str) -> Granularity | Sequence[str]:
        """Which cuts of a source are offered."""
        if isinstance(self.granularity, Mapping):
            return self.granularity.get(source, "blocks")
        return self.granularity


@dataclass(slots=True)
class Segmented:
    """A source at one image size, taken apart at its cuts.

    Attributes:
        source: The source.
        graph: Its traced graph at that size.
        cuts: The cuts where the search may leave and enter, in forward order.
        end: Name of the cut where networks end in it; None: its output.
        pieces: One module more than cuts: image to first cut, cut to cut, last cut to end. They share the source's
            parameters.
        costs: What each piece costs.
        preprocess: Images in [0, 1] to the source's own view.
        image_shape: (channels, height, width) of these images.
    """

    source: Source
    graph: CutGraph
    cuts: list[Cut]
    end: str | None
    pieces: list[fx.GraphModule]
    costs: list[Cost]
    preprocess: Preprocess
    image_shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def images_at_once(self) -> int:
        """How many images run fastest together on a CPU.

        Larger tensors than this come from the operating system page by page, each time anew, which costs more than the
        arithmetic: EfficientNet-Lite0 at 224 pixels ran 4 images at a time six times faster than 32.
        """
        return max(1, _CHUNK_BYTES // (4 * self.graph.largest_activation))

    def cost_between(self, first: int, last: int) -> Cost:
        """Cost of the pieces from one index up to, not including, another."""
        total = Cost(0, 0)
        for cost in self.costs[first:last]:
            total = total + cost
        return total

    @property
    def cost(self) -> Cost:
        """Cost of the whole source, up to where networks end."""
        return self.cost_between(0, len(self.pieces))


def chunks(images: Tensor, images_at_once: int) -> Sequence[Tensor]:
    """A batch in parts that run fastest one after the other; on an accelerator in one."""
    return images.split(images_at_once) if images.device.type == "cpu" else (images,)


def segment(source: Source, settings: CalibrationSettings, image_shape: tuple[int, int, int]) -> Segmented:
    """Take a source apart at its cuts for images of a shape.

    Raises:
        CutError: If it cannot be cut, has no feature vector to end at, or does not take images of that shape.
    """
    if image_shape[0] != source.preprocessing.input_size[0]:
        raise CutError(
            f"Source {source.name!r} takes images of {source.preprocessing.input_size[0]} channels; the calibration "
            f"images have {image_shape[0]}."
        )
    size = view_size(source.preprocessing, image_shape)
    try:
        graph = source.graph_at(size)
        end_cut = graph.feature_cut() if settings.until == "features" else None
        cuts = graph.cuts(settings.granularity_of(source.name))
    except CutError as error:
        raise CutError(
            f"Source {source.name!r} at {size[0]}x{size[1]}x{size[2]}: {error}{_mend(source, size)}"
        ) from error
    if end_cut is not None:
        # What lies between a cut and the features must have weights, or there is nothing to stitch to.
        cuts = [cut for cut in cuts if cut.macs < end_cut.macs]
    end = None if end_cut is None else end_cut.name
    ends = [None, *(cut.name for cut in cuts), end]
    pairs = list(pairwise(ends))
    return Segmented(
        source=source,
        graph=graph,
        cuts=cuts,
        end=end,
        pieces=[graph.fragment(a, b, share=True).eval() for a, b in pairs],
        costs=[Cost(sum(p.numel() for p in graph.parameters(a, b)), graph.macs(a, b)) for a, b in pairs],
        preprocess=Preprocess(source.preprocessing),
        image_shape=image_shape,
    )


def _mend(source: Source, size: tuple[int, int, int]) -> str:
    """What a source that does not take images of a size may need."""
    native = source.preprocessing.input_size
    try:
        source.graph_at(native)
    except CutError:
        return ""
    return (
        ""
        if size == native
        else (
            f"\nIt does take its native {native[0]}x{native[1]}x{native[2]}: use images of that size, or say "
            f"fixed_size=True in its preprocessing, and it gets them resized."
        )
    )


class CompositionCosts:
    """What every stitch between the cuts of some sources costs, and the least that any way on from a cut costs.

    Args:
        parts: The sources taken apart.
        bias: Whether stitches have a bias.
        max_fragments: Most fragments in a network.

    Attributes:
        receivers: All (source, cut) index pairs at which a fragment may begin.
    """

    def __init__(self, parts: Sequence[Segmented], *, bias: bool, max_fragments: int) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.receivers = [(s, r) for s, part in enumerate(self.parts) for r in range(len(part.cuts))]
        self.index = {receiver: flat for flat, receiver in enumerate(self.receivers)}
        self._pairs: dict[tuple[int, int, int, int], tuple[StitchSpec, Cost]] = {}
        self._max_fragments = max_fragments

    @cached_property
    def _jumps(self) -> dict[str, Tensor]:
        return {measure: self._jump_costs(measure) for measure in ("params", "macs")}

    @cached_property
    def _runs(self) -> dict[str, Tensor]:
        return {measure: self._run_costs(measure)[1] for measure in ("params", "macs")}

    @cached_property
    def _ahead(self) -> dict[str, list[Tensor]]:
        return {measure: self._completions(measure, self._max_fragments - 1) for measure in ("params", "macs")}

    @cached_property
    def completions(self) -> list[Cost]:
        """For each receiver the least that any way on from it costs."""
        params, macs = self._ahead["params"][-1].tolist(), self._ahead["macs"][-1].tolist()
        return [Cost(int(p), int(m)) for p, m in zip(params, macs, strict=True)]

    def stitch(self, sender: int, cut: int, source: int, receiver: int) -> tuple[StitchSpec, Cost]:
        """The stitch between two cuts where it is cheapest, and what it adds to its fragments."""
        key = (sender, cut, source, receiver)
        if key not in self._pairs:
            before, after = self._neighbours(*key)
            spec = stitch_spec(self.parts[sender].cuts[cut], self.parts[source].cuts[receiver], bias=self.bias)
            self._pairs[key] = self._placed(spec, before, after, before_taken=False)
        return self._pairs[key]

    def stitch_after_fold(self, sender: int, cut: int, source: int, receiver: int) -> tuple[StitchSpec, Cost]:
        """The same where the sender's last layer has taken the stitch before in at its entry, and takes no other."""
        spec, cost = self.stitch(sender, cut, source, receiver)
        if spec.placement != "producer":
            return spec, cost
        return self._placed(spec, *self._neighbours(sender, cut, source, receiver), before_taken=True)

    def self_stitched(self, source: int) -> Cost:
        """Cost of a source stitched to itself at each of its cuts; a fold can make it less than the source's."""
        total, taken = self.parts[source].cost, False
        for cut in range(len(self.parts[source].cuts)):
            find = self.stitch_after_fold if taken else self.stitch
            spec, cost = find(source, cut, source, cut)
            total, taken = total + cost, spec.placement == "consumer"
        return total

    def cheapest(self, measure: Literal["params", "macs"]) -> tuple[int, str]:
        """The least that any network costs in one measure, and the network in words."""
        wholes = [(getattr(part.cost, measure), f"{part.name} as it is") for part in self.parts]
        wholes += [
            (getattr(self.self_stitched(s), measure), f"{part.name} stitched to itself at each cut")
            for s, part in enumerate(self.parts)
        ]
        best, path = min(wholes, key=lambda whole: whole[0])
        for flat, (s, c) in enumerate(self.receivers):
            entry = getattr(self.parts[s].cost_between(0, c + 1), measure)
            onward = self._jumps[measure][flat] + self._ahead[measure][-1]
            total = entry + onward.min().item()
            if total < best:
                start = f"{self.parts[s].name} to {self.parts[s].cuts[c].name}"
                best, path = int(total), f"{start}, then {self._path(measure, int(onward.argmin()))}"
        return best, path

    def _path(self, measure: str, flat: int) -> str:
        """The cheapest way on from a receiver in words."""
        s, r = self.receivers[flat]
        text = f"{self.parts[s].name} from {self.parts[s].cuts[r].name}"
        ahead = self._ahead[measure]
        rounds = next(index for index, costs in enumerate(ahead) if costs[flat] == ahead[-1][flat])
        if rounds == 0:
            return f"{text} to its end"
        jumps = self._jumps[measure] + ahead[rounds - 1]
        cut = int((self._runs[measure][flat] + jumps.amin(1)).argmin())
        onward = self._path(measure, int(jumps[cut].argmin()))
        return f"{text} to {self.parts[s].cuts[self.receivers[cut][1]].name}, then {onward}"

    def check(self, budget: Budget) -> None:
        """Refuse a budget that no composition can keep.

        Raises:
            BudgetError: Naming the cheapest composition of these sources and its cost.
        """
        for measure, limit, unit in (("params", budget.max_params, "parameters"), ("macs", budget.max_macs, "MACs")):
            if limit is None:
                continue
            least, path = self.cheapest(measure)  # type: ignore[arg-type]
            if least > limit:
                raise BudgetError(
                    f"No network keeps the budget of at most {limit / 1e6:.12g} M {unit}: the cheapest composition has "
                    f"{least / 1e6:.12g} M ({path}). Raise the budget, add a smaller source, use a finer granularity "
                    f"or smaller images."
                )

    def _placed(
        self, spec: StitchSpec, before: fx.GraphModule, after: fx.GraphModule, *, before_taken: bool
    ) -> tuple[StitchSpec, Cost]:
        placement = choose_placement(before, after, spec, before_taken=before_taken)
        return dataclasses.replace(spec, placement=placement), Cost(*stitch_cost(spec, before, after, placement))

    def _neighbours(self, sender: int, cut: int, source: int, receiver: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.parts[sender].pieces[cut], self.parts[source].pieces[receiver + 1]

    def _jump_costs(self, measure: str) -> Tensor:
        """Cost of the stitch from each cut to each receiver; infinite where there is none."""
        jumps = torch.full((len(self.receivers),) * 2, torch.inf, dtype=torch.float64)
        for i, (s, c) in enumerate(self.receivers):
            for j, (t, r) in enumerate(self.receivers):
                if is_bridgeable(self.parts[s].cuts[c], self.parts[t].cuts[r]):
                    jumps[i, j] = getattr(self.stitch(s, c, t, r)[1], measure)
        return jumps

    def _run_costs(self, measure: str) -> tuple[Tensor, Tensor]:
        """Cost from each receiver to its source's end, and to each later cut of its source."""
        to_end = [self.parts[s].cost_between(r + 1, len(self.parts[s].pieces)) for s, r in self.receivers]
        runs = torch.full((len(self.receivers),) * 2, torch.inf, dtype=torch.float64)
        for i, (s, r) in enumerate(self.receivers):
            for cut in range(r + 1, len(self.parts[s].cuts)):
                runs[i, self.index[s, cut]] = getattr(self.parts[s].cost_between(r + 1, cut + 1), measure)
        return torch.tensor([getattr(cost, measure) for cost in to_end], dtype=torch.float64), runs

    def _completions(self, measure: str, most_stitches: int) -> list[Tensor]:
        """The least that any way on from each receiver costs, with up to 0, 1, ... more stitches (Bellman)."""
        found = [self._run_costs(measure)[0]]
        for _ in range(most_stitches - 1 if self.receivers else 0):
            onward = (self._runs[measure] + (self._jumps[measure] + found[-1]).amin(1)).amin(1)
            found.append(torch.minimum(found[-1], onward))
            if torch.equal(found[-1], found[-2]):
                break
        return found
