"""The recipe: a frozen, plain-JSON description from which a composition's structure is rebuilt.

A composition is a tree of fragments with taps. A chain with one tap at its end is the paper's StitchNet; a root whose
last tap lies at a cut is an early exit; several roots are sources side by side; several ends under an `Average` are an
ensemble. All of them are a `Recipe`. A fragment ends wherever it is read, so that what runs of a source without a
stitch is often several fragments in a row: a `Run`. Where `stages` are, images that a stage is sure of go no further.

Standard library only. A recipe holds structure; the state dict holds numbers. It is the only thing that search,
checkpoint, YAML, hub and ranks exchange, so every field is a dict, list, string, number, bool or None.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Literal, cast

from lightning_stitch.errors import RecipeError
from lightning_stitch.plain_values import built, plain
from lightning_stitch.stages import Stages

SCHEMA_VERSION = 3

Format = Literal["NCHW", "NHWC", "tokens", "vector"]
Placement = Literal["explicit", "producer", "consumer"]
Statistic = Literal["mean", "std", "prefix"]
Mean = Literal["arithmetic", "geometric"]
Builder = Literal["timm", "torchvision", "python", "live"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a source wants its images.

    Attributes:
        input_size: Native (channels, height, width).
        mean: Mean of each channel of an image whose values lie in [0, 1].
        std: Standard deviation of each channel, likewise.
        interpolation: Name of the interpolation the source was trained with ("bicubic", "bilinear", ...).
        fixed_size: True where the source accepts no other height and width than its native ones.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    fixed_size: bool = False


@dataclass(frozen=True, slots=True)
class SourceRef:
    """Identity of a source, and what it takes to rebuild its architecture without its weights.

    Attributes:
        name: The short name by which fragments refer to it, unique within a recipe.
        spec: What the user wrote ("timm name", "torchvision:NAME", "local-dir:PATH", ...).
        builder: Which library builds the architecture; "live": a module given as an object, which cannot be rebuilt.
        architecture: The builder's own name for it (timm or torchvision model name, "pkg.mod:factory").
        arguments: Keyword arguments of the builder.
        revision: Commit hash or tag of the weights, where there is one.
        weight_hash: "sha256:..." over the names, dtypes, shapes and bytes of the source's state dict.
        licence: SPDX identifier or the hub's licence word; None where unknown.
        preprocessing: How it wants its images.
    """

    name: str
    spec: str
    builder: Builder
    architecture: str
    weight_hash: str
    preprocessing: Preprocessing
    arguments: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class StitchSpec:
    """What joins one fragment's output to the next one's input: format bridge, resample, affine map.

    Attributes:
        in_format: Format of the sender's cut.
        out_format: Format of the receiver's cut.
        in_channels: Channels of the sender's cut.
        out_channels: Channels of the receiver's cut.
        in_size: Grid (height, width) of the sender's cut in the calibration run; None for a vector.
        out_size: Grid of the receiver's cut; None for a vector.
        in_prefix_tokens: Prefix tokens of the sender's cut. Where the receiver has as many they go through the affine
            map, too; else they are dropped.
        out_prefix_tokens: Prefix tokens of the receiver's cut, supplied from its calibration mean where the sender
            has not as many.
        bias: Whether the affine map has a bias.
        placement: Where the affine map lives: a layer of its own ("explicit"), or folded into the last layer of the
            fragment before ("producer") or the first layers of the fragment behind ("consumer").
        cka: Linear CKA of sender and receiver on the calibration rows.
        r2: Share of the receiver's variance that the map explains on calibration images held out of its fit.
        rank: Numerical rank of the least-squares problem.
        condition: Condition number of the regularised least-squares problem.
    """

    in_format: Format
    out_format: Format
    in_channels: int
    out_channels: int
    in_size: tuple[int, int] | None
    out_size: tuple[int, int] | None
    in_prefix_tokens: int = 0
    out_prefix_tokens: int = 0
    bias: bool = True
    placement: Placement = "explicit"
    cka: float | None = None
    r2: float | None = None
    rank: int | None = None
    condition: float | None = None

    @property
    def carries_prefix(self) -> bool:
        """Whether prefix tokens go from the sender to the receiver, because both have as many."""
        return self.in_prefix_tokens == self.out_prefix_tokens > 0


@dataclass(frozen=True, slots=True)
class FragmentRef:
    """The part of one source between two cuts, and what leads into it.

    Attributes:
        source: Name of a source of the recipe.
        start: Name of the cut where it begins; None: at the image.
        end: Name of the cut where it ends; None: at the source's output.
        parent: Number of the fragment that it continues; None: it begins at the image.
        stitch: What leads from its parent into it; None: it begins at the image, or goes on where its parent ends.
        image_size: (height, width) to which the image is resized where it begins; None: the image's own.
    """

    source: str
    start: str | None
    end: str | None
    parent: int | None = None
    stitch: StitchSpec | None = None
    image_size: tuple[int, int] | None = None

    def __str__(self) -> str:
        size = "" if self.image_size is None else f" at {self.image_size[0]}x{self.image_size[1]}"
        return f"{self.source}: {self.start or 'image'}{size} .. {self.end or 'output'}"


@dataclass(frozen=True, slots=True)
class Run:
    """Fragments in a row that one source runs without a stitch in between, and without a branch.

    Attributes:
        fragments: Their numbers, in forward order.
        ref: All of them as one fragment.
    """

    fragments: tuple[int, ...]
    ref: FragmentRef


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a composition is read: the activation at the end of one of its fragments.

    Attributes:
        fragment: Number of the fragment.
        channels: Channels of the activation; of a vector its width.
        statistics: What is read of a map or of tokens, in this order: "mean" and "std" over positions (of tokens: over
            patch tokens), and "prefix", the prefix tokens themselves. Empty: the activation is a vector and is read as
            it is.
        prefix_tokens: How many prefix tokens "prefix" stands for.
        share: Its share of the variance of what a linear head predicts from all taps, on the labelled images; None: no
            such head was fitted.
    """

    fragment: int
    channels: int
    statistics: tuple[Statistic, ...] = ()
    prefix_tokens: int = 0
    share: float | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Width of each statistic of what it gives, in their order; of a vector its own."""
        if not self.statistics:
            return (self.channels,)
        return tuple(
            self.channels * (self.prefix_tokens if statistic == "prefix" else 1) for statistic in self.statistics
        )

    @property
    def num_features(self) -> int:
        """Width of what it gives."""
        return sum(self.blocks)


@dataclass(frozen=True, slots=True)
class Average:
    """Heads inside a composition, each on taps of its own, whose probabilities are averaged: an ensemble.

    Attributes:
        members: For each member the numbers of the taps that it reads, side by side.
        num_classes: Width of the output.
        mean: Of the members' probabilities ("arithmetic"), or of their log-probabilities, normalised again.
        with_heads: Whether a linear head reads each member's taps; False: its tap gives logits already.
    """

    members: tuple[tuple[int, ...], ...]
    num_classes: int
    mean: Mean = "arithmetic"
    with_heads: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """A composition's structure: a tree of fragments, and the taps where it is read.

    Attributes:
        sources: The sources that the fragments come from, each once.
        fragments: The tree, each fragment behind its parent.
        taps: What the composition gives, side by side in this order.
        input_size: (channels, height, width) of the images that it was calibrated on.
        average: Heads inside it that read the taps, if it averages their probabilities; None: it gives the taps.
        stages: Where images may stop, if not all go all the way; None: all do.
        scores: What the search measured ("cka_product", "macs", "params", ranking scores, and "latency_ms" or
            "activation_bytes" where a budget limits them), by name.
        share_weights: False: every fragment has weights of its own. True: what fragments of one source have in common
            (one fragment used twice, fragments that overlap, weights that the source ties) is there once, and is
            trained for all of them; only layers that take a stitch in become a fragment's own.
        healed: Whether the layers behind its stitches were healed after it was composed.
        unhealed: Where it was, the layers behind stitches ("source: layer") that stayed as they are, and why.
        schema: Version of this format.

    Raises:
        RecipeError: If the parts do not fit each other.
    """

    sources: tuple[SourceRef, ...]
    fragments: tuple[FragmentRef, ...]
    taps: tuple[Tap, ...]
    input_size: tuple[int, int, int]
    average: Average | None = None
    stages: Stages | None = None
    scores: dict[str, float] = field(default_factory=dict)
    share_weights: bool = False
    healed: bool = False
    unhealed: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @classmethod
    def chain(
        cls,
        sources: Sequence[SourceRef],
        fragments: Sequence[FragmentRef],
        stitches: Sequence[StitchSpec | None] = (),
        *,
        num_features: int,
        input_size: tuple[int, int, int],
        averaged: bool = False,
        **fields: Any,
    ) -> Recipe:
        """The recipe of fragments in a row, read at their end alone.

        Args:
            sources: The sources that the fragments come from.
            fragments: In forward order; the first begins at the image. Parents and stitches of theirs are replaced.
            stitches: One entry between each two fragments; None where a fragment goes on in its own source.
            num_features: Width of what the chain gives.
            input_size: (channels, height, width) of the images that it was calibrated on.
            averaged: Whether the last fragment ends at a map or at tokens, which are averaged over their positions.
            fields: Others of the recipe's.

        Raises:
            RecipeError: If the parts do not fit each other.
        """
        if len(stitches) != max(len(fragments) - 1, 0):
            raise RecipeError(
                f"A chain of {len(fragments)} fragments has {len(fragments) - 1} stitches between them; found "
                f"{len(stitches)}."
            )
        links = tuple(
            dataclasses.replace(fragment, parent=index - 1 if index else None, stitch=stitch)
            for index, (fragment, stitch) in enumerate(zip(fragments, (None, *stitches), strict=False))
        )
        tap = Tap(len(links) - 1, num_features, ("mean",) if averaged else ())
        return cls(tuple(sources), links, (tap,), input_size, **fields)

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        if not self.fragments or not self.taps:
            raise RecipeError(
                f"A recipe needs at least one fragment and one tap; this one has {len(self.fragments)} and "
                f"{len(self.taps)}."
            )
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise RecipeError(f"Two sources of a recipe share a name: {names}.")
        unknown = {fragment.source for fragment in self.fragments} - set(names)
        if unknown:
            raise RecipeError(f"Fragments refer to {sorted(unknown)}, but the recipe's sources are {names}.")
        sizes = [fragment.image_size for fragment in self.fragments if fragment.image_size is not None]
        if min(min(size) for size in (self.input_size, *sizes)) < 1:
            raise RecipeError(
                f"input_size is (channels, height, width), each at least 1, and image_size likewise; found "
                f"{self.input_size} and {sizes}."
            )
        for index, fragment in enumerate(self.fragments):
            self._check_entry(index, fragment)
        for tap in self.taps:
            self._check_tap(tap)
        tapped = {tap.fragment for tap in self.taps}
        if idle := set(range(len(self.fragments))) - tapped - {fragment.parent for fragment in self.fragments}:
            raise RecipeError(f"No fragment and no tap is behind {self.fragments[min(idle)]}: it leads nowhere.")
        if self.average is not None:
            self._check_average(self.average)
        if self.stages is not None and (self.average is not None or self.stages.taps[-1] != len(self.taps)):
            raise RecipeError(f"The last stage reads all {len(self.taps)} taps, averages none; found {self.stages}.")

    def _check_entry(self, index: int, fragment: FragmentRef) -> None:
        if fragment.parent is None:
            if fragment.start is not None or fragment.stitch is not None:
                raise RecipeError(
                    f"A fragment without a parent begins at the image, without a stitch; found {fragment}."
                )
            return
        if fragment.image_size is not None:
            raise RecipeError(f"Only a fragment that begins at the image resizes it; found {fragment}.")
        if not 0 <= fragment.parent < index:
            raise RecipeError(f"A fragment stands behind its parent; fragment {index} has parent {fragment.parent}.")
        before = self.fragments[fragment.parent]
        if fragment.stitch is None and (before.source, before.end) != (fragment.source, fragment.start):
            raise RecipeError(f"Nothing joins {before} to {fragment}: without a stitch both must meet at one cut.")

    def _check_tap(self, tap: Tap) -> None:
        if not 0 <= tap.fragment < len(self.fragments):
            raise RecipeError(f"Taps are at fragments 0 to {len(self.fragments) - 1}; found {tap.fragment}.")
        repeated = len(set(tap.statistics)) < len(tap.statistics)
        if tap.channels < 1 or repeated or ("prefix" in tap.statistics) != (tap.prefix_tokens > 0):
            raise RecipeError(
                f"A tap reads channels, each statistic once, and prefix tokens if there are; found {tap}."
            )
        if tap.statistics and self.fragments[tap.fragment].end is None:
            raise RecipeError("A source's output is read as it is: only cuts have positions to average over.")

    def _check_average(self, average: Average) -> None:
        if not average.members or any(
            not member or not all(0 <= tap < len(self.taps) for tap in member) for member in average.members
        ):
            raise RecipeError(
                f"Members of an average read taps 0 to {len(self.taps) - 1}, one at least; found {average.members}."
            )
        widths = {sum(self.taps[tap].num_features for tap in member) for member in average.members}
        if average.num_classes < 1 or not (average.with_heads or widths == {average.num_classes}):
            raise RecipeError(
                f"An average over {average.num_classes} classes needs members of that width, or heads; found {widths}."
            )

    @property
    def fragment_stages(self) -> tuple[int, ...]:
        """The first stage that needs each fragment; 0 where there is but one."""
        needed = [len(self.stages.taps) - 1 if self.stages else 0] * len(self.fragments)
        taps = self.stages.taps if self.stages else (len(self.taps),)
        for stage, (first, last) in reversed(list(enumerate(zip((0, *taps), taps, strict=False)))):
            for tap in self.taps[first:last]:
                fragment: int | None = tap.fragment
                while fragment is not None:
                    needed[fragment] = min(needed[fragment], stage)
                    fragment = self.fragments[fragment].parent
        return tuple(needed)

    @property
    def stage_blocks(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the blocks (`blocks`) that its head reads."""
        taps = self.stages.taps if self.stages else (len(self.taps),)
        ends = list(accumulate((len(tap.blocks) for tap in self.taps), initial=0))
        return tuple(self.blocks[: ends[count]] for count in taps)

    @property
    def num_features(self) -> int:
        """Width of what the composition gives."""
        return sum(tap.num_features for tap in self.taps) if self.average is None else self.average.num_classes

    @property
    def stitches(self) -> tuple[StitchSpec, ...]:
        """All stitches, in the order of the fragments that they lead into."""
        return tuple(fragment.stitch for fragment in self.fragments if fragment.stitch is not None)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Widths of the statistics of all taps, in the order of the features that the composition gives."""
        return tuple(width for tap in self.taps for width in tap.blocks)

    @property
    def head_blocks(self) -> tuple[int, ...] | None:
        """The blocks that a closed-form head weighs against each other; None: there is one, which it reads as it is."""
        return self.blocks if len(self.blocks) > 1 and self.average is None else None

    @property
    def num_behind(self) -> tuple[int, ...]:
        """How many stitches the longest way from each fragment's end passes."""
        counts = [0] * len(self.fragments)
        for index in reversed(range(len(self.fragments))):
            parent, stitch = self.fragments[index].parent, self.fragments[index].stitch
            if parent is not None:
                counts[parent] = max(counts[parent], counts[index] + (stitch is not None))
        return tuple(counts)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The fragments in runs, in the order of the first of each."""
        children = Counter(fragment.parent for fragment in self.fragments)
        runs: list[list[int]] = []
        place: dict[int, list[int]] = {}
        for index, fragment in enumerate(self.fragments):
            if fragment.parent is None or fragment.stitch is not None or children[fragment.parent] > 1:
                runs.append([])
                place[index] = runs[-1]
            else:
                place[index] = place[fragment.parent]
            place[index].append(index)
        return tuple(
            Run(tuple(run), dataclasses.replace(self.fragments[run[0]], end=self.fragments[run[-1]].end))
            for run in runs
        )

    @property
    def is_chain(self) -> bool:
        """Whether the fragments stand in a row, wherever they are read."""
        parents = [fragment.parent for fragment in self.fragments]
        return parents == [None, *range(len(parents) - 1)] and self.average is None

    @property
    def path(self) -> str:
        """The ways from the image to each end in words, as "a: image .. layer2 -> b: blocks.3 .. output"."""
        parents = {fragment.parent for fragment in self.fragments}
        ends = {tap.fragment: tap for tap in self.taps if tap.fragment not in parents}
        return " | ".join(self._way_in_words(tap) for tap in ends.values())

    def way_to(self, fragment: int) -> list[FragmentRef]:
        """The fragments from the image to one of them, in forward order."""
        way = [self.fragments[fragment]]
        while way[0].parent is not None:
            way.insert(0, self.fragments[way[0].parent])
        return way

    def _way_in_words(self, tap: Tap) -> str:
        words: list[FragmentRef] = []
        for fragment in self.way_to(tap.fragment):
            if words and fragment.stitch is None:
                words[-1] = dataclasses.replace(words[-1], end=fragment.end)
            else:
                words.append(fragment)
        return " -> ".join(map(str, words)) + (" (ends early)" if tap.statistics else "")

    def with_shares(self, shares: Sequence[float]) -> Recipe:
        """The same, with each tap's share of the predictions' variance, from that of each block (`blocks`)."""
        remaining = iter(shares)
        taps = [dataclasses.replace(tap, share=sum(islice(remaining, len(tap.blocks)))) for tap in self.taps]
        return dataclasses.replace(self, taps=tuple(taps))

    def with_stitches(self, stitches: Sequence[StitchSpec]) -> Recipe:
        """The same with other stitches, one for each that it has (`stitches`)."""
        remaining = iter(stitches)
        fragments = [
            fragment if fragment.stitch is None else dataclasses.replace(fragment, stitch=next(remaining))
            for fragment in self.fragments
        ]
        return dataclasses.replace(self, fragments=tuple(fragments))

    def source(self, name: str) -> SourceRef:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts, lists, strings and numbers; `Recipe.from_dict` takes it back."""
        fields = cast(dict[str, Any], plain(dataclasses.asdict(self)))
        return fields if self.stages is not None else {k: v for k, v in fields.items() if k != "stages"}

    @classmethod
    def from_dict(cls, plain_recipe: dict[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_dict`'s result.

        Raises:
            RecipeError: If the schema is newer than this version's, or a field is missing, unknown or ill-typed.
        """
        if not isinstance(plain_recipe, dict):
            raise RecipeError(f"A recipe is a dict as `Recipe.to_dict` makes it; found {type(plain_recipe).__name__}.")
        schema = plain_recipe.get("schema")
        if schema != SCHEMA_VERSION:
            raise RecipeError(
                f"This recipe has schema {schema!r}; this version of lightning_stitch reads schema {SCHEMA_VERSION}. "
                f"Upgrade lightning_stitch if the recipe is newer."
            )
        try:
            return built(cls, plain_recipe)
        except (KeyError, TypeError) as error:
            raise RecipeError(f"This is no recipe of schema {SCHEMA_VERSION}: {error}.") from error
