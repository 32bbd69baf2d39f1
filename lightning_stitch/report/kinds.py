"""What kinds of networks a comparison tells apart, and what they are called."""

from __future__ import annotations

from lightning_stitch.recipe import Recipe
from lightning_stitch.stitching import Candidate

# Kind -> the name of its row, what sentences call it, and a headline. `names` are those of its sources.
_WORDS = {
    "source": ("{names}", "{names}", "A source was chosen, as it is"),
    "self-stitched": ("{names}", "{names} stitched to itself", "A source stitched to itself was chosen"),
    "early exit": ("{names}", "{names} ended at {end}", "A source that ends early was chosen"),
    "smaller image": ("{names}", "{names} at {size} to {end}", "A source on smaller images was chosen"),
    "shortened": ("{names}", "{names} shortened", "A shortened source was chosen"),
    "stitched": ("StitchNet", "StitchNet of {names}", "A StitchNet was chosen"),
    "side by side": ("side by side", "{names} side by side", "Sources side by side were chosen"),
    "staged": ("stops when sure", "{names}, stopping when sure", "A network that stops when it is sure was chosen"),
}
# What is shown under every budget; the others are compared whatever they cost.
UNDER_BUDGETS = ("stitched", "side by side", "shortened", "early exit", "smaller image", "staged")
# What a composition of several sources has to be better than, or as good as at a lower cost.
RIVALS = ("source", "shortened", "early exit", "smaller image")


def sources_of(recipe: Recipe) -> tuple[str, ...]:
    """The sources that a network's fragments come from, each once, in forward order."""
    return tuple(dict.fromkeys(fragment.source for fragment in recipe.fragments))


def is_composition(candidate: Candidate) -> bool:
    """Whether it is composed of several sources."""
    return len(sources_of(candidate.recipe)) > 1


def rival_group(candidate: Candidate) -> tuple[object, ...]:
    """What has a best one of its own among rivals: the kind, the size of its images, and whether it has many taps."""
    return candidate.kind, _image_size(candidate.recipe), len(candidate.recipe.taps) > 1


def _image_size(recipe: Recipe) -> str:
    """The size of the images that the first fragment sees, as "96x96"."""
    return "x".join(map(str, recipe.fragments[0].image_size or recipe.input_size[1:]))


def row_name(candidate: Candidate) -> str:
    """What the candidate's row in a table is called; rows have their kind and sources besides."""
    return _fill(0, candidate)


def label_of(candidate: Candidate) -> str:
    """What sentences call the candidate, as "StitchNet of resnet and vit"."""
    return _fill(1, candidate)


def headline(kind: str) -> str:
    """That a candidate of a kind was chosen, as "A StitchNet was chosen"; a record's kind may be from elsewhere."""
    return _WORDS[kind][2] if kind in _WORDS else f"{kind} was chosen"


def _fill(which: int, candidate: Candidate) -> str:
    *others, last = sources_of(candidate.recipe)
    names = f"{', '.join(others)} and {last}" if others else last
    words = _WORDS[candidate.kind][which]
    end = candidate.recipe.fragments[-1].end or "its output"
    return words.format(names=names, end=end, size=_image_size(candidate.recipe))
