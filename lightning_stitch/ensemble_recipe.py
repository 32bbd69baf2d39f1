"""The structure of an ensemble: a tree of fragments, whose leaves are the members' last ones; plain JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lightning_stitch.errors import RecipeError
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef, StitchSpec, built, plain

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
