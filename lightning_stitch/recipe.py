"""The recipe: a frozen, plain-JSON description from which a stitched network's structure is rebuilt.

Standard library only. A recipe holds structure; the state dict holds numbers. It is the only thing that search,
checkpoint, YAML, hub and ranks exchange, so every field is a dict, list, string, number, bool or None.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_stitch.errors import RecipeError

SCHEMA_VERSION = 1

Format = Literal["NCHW", "NHWC", "tokens", "vector"]
Placement = Literal["explicit", "producer", "consumer"]
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
class FragmentRef:
    """The part of one source between two cuts.

    Attributes:
        source: Name of a source of the recipe.
        start: Name of the cut where it begins; None: at the image.
        end: Name of the cut where it ends; None: at the source's output.
    """

    source: str
    start: str | None
    end: str | None


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
class Recipe:
    """A stitched network's structure: fragments in order, a stitch or None between each two of them.

    Attributes:
        sources: The sources that the fragments come from, each once.
        fragments: In forward order; the first begins at the image.
        stitches: One entry between each two fragments; None where a fragment simply goes on in its own source.
        input_size: (channels, height, width) of the images that the network was calibrated on.
        scores: What the search measured ("cka_product", "macs", "params", "activation_bytes", ranking scores, and
            "latency_ms" where a budget limits it), by name.
        share_weights: False: every fragment has weights of its own. True: what fragments of one source have in common
            (one fragment used twice, fragments that overlap, weights that the source ties) is there once, and is
            trained for all of them; only layers that take a stitch in become a fragment's own.
        pooled: Whether the last fragment ends at a map or at tokens that are averaged over their positions: a network
            that ends early.
        healed: Whether the layers behind its stitches were healed after it was composed.
        unhealed: Where it was, the layers behind stitches ("source: layer") that stayed as they are, and why.
        schema: Version of this format.

    Raises:
        RecipeError: If the parts do not fit each other.
    """

    sources: tuple[SourceRef, ...]
    fragments: tuple[FragmentRef, ...]
    stitches: tuple[StitchSpec | None, ...] = ()
    input_size: tuple[int, int, int] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    share_weights: bool = False
    pooled: bool = False
    healed: bool = False
    unhealed: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        if not self.fragments:
            raise RecipeError("A recipe needs at least one fragment; this one has none.")
        if len(self.stitches) != len(self.fragments) - 1:
            raise RecipeError(
                f"A recipe of {len(self.fragments)} fragments needs {len(self.fragments) - 1} stitches between them; "
                f"this one has {len(self.stitches)}."
            )
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise RecipeError(f"Two sources of a recipe share a name: {names}.")
        unknown = {f.source for f in self.fragments} - set(names)
        if unknown:
            raise RecipeError(f"Fragments refer to {sorted(unknown)}, but the recipe's sources are {names}.")
        if self.fragments[0].start is not None:
            raise RecipeError(f"The first fragment must begin at the image, not at cut {self.fragments[0].start!r}.")
        if self.pooled and self.fragments[-1].end is None:
            raise RecipeError("A pooled network ends at a cut; this recipe's last fragment runs to the output.")
        for before, stitch, after in zip(self.fragments, self.stitches, self.fragments[1:], strict=False):
            if stitch is None and (before.source, before.end) != (after.source, after.start):
                raise RecipeError(f"Nothing joins {before} to {after}: without a stitch both must meet at one cut.")

    @property
    def preprocessing(self) -> Preprocessing:
        """The start fragment's preprocessing, which is the stitched network's."""
        return self.source(self.fragments[0].source).preprocessing

    @property
    def path(self) -> str:
        """The fragments in words, as "a: image .. layer2 -> b: blocks.3 .. output"."""
        words = [f"{f.source}: {f.start or 'image'} .. {f.end or 'output'}" for f in self.fragments]
        return " -> ".join(words) + (" (ends early)" if self.pooled else "")

    def source(self, name: str) -> SourceRef:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts, lists, strings and numbers; `Recipe.from_dict` takes it back."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return found

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_dict`'s result.

        Raises:
            RecipeError: If the schema is newer than this version's, or a field is missing, unknown or ill-typed.
        """
        if not isinstance(plain, dict):
            raise RecipeError(f"A recipe is a dict as `Recipe.to_dict` makes it; found {type(plain).__name__}.")
        schema = plain.get("schema")
        if schema != SCHEMA_VERSION:
            raise RecipeError(
                f"This recipe has schema {schema!r}; this version of lightning_stitch reads schema {SCHEMA_VERSION}. "
                f"Upgrade lightning_stitch if the recipe is newer."
            )
        try:
            sources = tuple(
                built(SourceRef, {**s, "preprocessing": built(Preprocessing, s["preprocessing"])})
                for s in plain["sources"]
            )
            fragments = tuple(built(FragmentRef, f) for f in plain["fragments"])
            stitches = tuple(None if s is None else built(StitchSpec, s) for s in plain["stitches"])
            return built(cls, {**plain, "sources": sources, "fragments": fragments, "stitches": stitches})
        except (KeyError, TypeError) as error:
            raise RecipeError(f"This is no recipe of schema {SCHEMA_VERSION}: {error}.") from error


_Part = TypeVar("_Part")


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down, so that JSON and a checkpoint give back what was put in."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def built(cls: type[_Part], fields: dict[str, Any]) -> _Part:
    """The inverse for one dataclass, its fields' types checked: a recipe may come from a stranger."""
    if not isinstance(fields, dict):
        raise TypeError(f"{cls.__name__} is {fields!r}; expected a dict")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    part = cls(**values)
    for name, wanted in get_type_hints(cls).items():
        if not _is_of_type(getattr(part, name), wanted):
            expected = wanted.__name__ if wanted in (str, int, float, bool) else str(wanted).replace("typing.", "")
            raise TypeError(f"{cls.__name__}.{name} is {getattr(part, name)!r}; expected {expected}")
    return part


def _is_of_type(value: Any, wanted: Any) -> bool:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_is_of_type, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(_is_of_type(item, parts[1]) for item in value.values())
    if wanted in (int, float):
        return isinstance(value, int | float if wanted is float else int) and not isinstance(value, bool)
    return wanted is Any or isinstance(value, wanted)


ENSEMBLE_SCHEMA = 1

Mean = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, slots=True)
class Branch:
    """A fragment that all members behind it share.

    Attributes:
        parent: Number of the branch before it; None: it begins at the image.
        fragment: The fragment.
        stitch: What leads into it; None: it begins at the image, or goes on where its parent ends.
    """

    parent: int | None
    fragment: FragmentRef
    stitch: StitchSpec | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One network of the ensemble.

    Attributes:
        branch: Number of its last branch.
        pooled: Whether that branch's output is averaged over its positions: a network that ends early.
        in_features: What its linear head reads; None: it has none and ends at its last source's output.
    """

    branch: int
    pooled: bool
    in_features: int | None


@dataclass(frozen=True, slots=True)
class EnsembleRecipe:
    """An ensemble's structure.

    Attributes:
        sources: The sources that fragments come from, each once.
        branches: The tree, each branch behind its parent.
        members: The networks, each a leaf or a stop on the way.
        mean: How the members' outputs are averaged.
        num_classes: Width of the output.
        input_size: (channels, height, width) of the images that the networks were calibrated on.
        kind: Tells it from a single network's recipe.
        schema: Version of this format.

    Raises:
        RecipeError: If the parts do not fit each other.
    """

    sources: tuple[SourceRef, ...]
    branches: tuple[Branch, ...]
    members: tuple[Member, ...]
    mean: Mean
    num_classes: int
    input_size: tuple[int, int, int]
    kind: Literal["ensemble"] = "ensemble"
    schema: int = ENSEMBLE_SCHEMA

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        names = [source.name for source in self.sources]
        unknown = {branch.fragment.source for branch in self.branches} - set(names)
        if unknown or len(set(names)) < len(names):
            raise RecipeError(f"Branches refer to {sorted(unknown)}; the ensemble's sources are {names}.")
        for number, branch in enumerate(self.branches):
            if branch.parent is None:
                if branch.fragment.start is not None or branch.stitch is not None:
                    raise RecipeError(f"Branch {number} has no parent, so it begins at the image, without a stitch.")
                continue
            if not 0 <= branch.parent < number:
                raise RecipeError(f"Branch {number} comes behind its parent; found parent {branch.parent}.")
            before = self.branches[branch.parent].fragment
            if branch.stitch is None and (before.source, before.end) != (branch.fragment.source, branch.fragment.start):
                raise RecipeError(
                    f"Nothing joins branch {branch.parent} to branch {number}: without a stitch they meet."
                )
        if not self.members or not all(0 <= member.branch < len(self.branches) for member in self.members):
            raise RecipeError(f"Members end at branches 0 to {len(self.branches) - 1}; found {list(self.members)}.")

    def source(self, name: str) -> SourceRef:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    def way_to(self, member: Member) -> list[Branch]:
        """A member's branches, in forward order."""
        way = [self.branches[member.branch]]
        while way[0].parent is not None:
            way.insert(0, self.branches[way[0].parent])
        return way

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts, lists, strings and numbers; `EnsembleRecipe.from_dict` takes it back."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return found

    @classmethod
    def from_dict(cls, plain_recipe: dict[str, Any]) -> EnsembleRecipe:
        """Rebuild a recipe from `to_dict`'s result.

        Raises:
            RecipeError: If the schema is newer than this version's, or a field is missing, unknown or ill-typed.
        """
        schema = plain_recipe.get("schema")
        if schema != ENSEMBLE_SCHEMA:
            raise RecipeError(
                f"This ensemble has schema {schema!r}; this version of lightning_stitch reads schema "
                f"{ENSEMBLE_SCHEMA}. Upgrade lightning_stitch if it is newer."
            )
        try:
            sources = [
                built(SourceRef, {**s, "preprocessing": built(Preprocessing, s["preprocessing"])})
                for s in plain_recipe["sources"]
            ]
            branches = [
                built(
                    Branch,
                    {
                        **branch,
                        "fragment": built(FragmentRef, branch["fragment"]),
                        "stitch": None if branch["stitch"] is None else built(StitchSpec, branch["stitch"]),
                    },
                )
                for branch in plain_recipe["branches"]
            ]
            members = [built(Member, member) for member in plain_recipe["members"]]
            return built(cls, {**plain_recipe, "sources": sources, "branches": branches, "members": members})
        except (KeyError, TypeError) as error:
            raise RecipeError(f"This is no ensemble of schema {ENSEMBLE_SCHEMA}: {error}.") from error


def any_recipe(plain_recipe: dict[str, Any]) -> Recipe | EnsembleRecipe:
    """The recipe of a stitched network or of an ensemble, whichever a dict holds.

    Raises:
        RecipeError: If it is neither.
    """
    if isinstance(plain_recipe, dict) and plain_recipe.get("kind") == "ensemble":
        return EnsembleRecipe.from_dict(plain_recipe)
    return Recipe.from_dict(plain_recipe)
