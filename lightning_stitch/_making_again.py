"""What a card says of making its network again: the command, the Python, the recipe, and sources by their commits."""

from __future__ import annotations

import re
from typing import Any

from lightning_stitch._markdown import fenced
from lightning_stitch.pretrained_files import shown_recipe, shown_spec
from lightning_stitch.recipe import EnsembleRecipe, Recipe, SourceRef
from lightning_stitch.sources.timm_models import hub_repository


def hub_name(ref: SourceRef) -> str | None:
    """The source's repository on the hub, where it came from there."""
    prefix, colon, rest = ref.spec.partition(":")
    if colon:
        return rest.partition("@")[0] if prefix == "hf-hub" else None
    return hub_repository(ref.architecture) if ref.builder == "timm" and ref.revision else None


def how_to_make_again(recipe: Recipe | EnsembleRecipe, command: str | None) -> str:
    """In Markdown; the Python is left out where it would not make the same network."""
    from huggingface_hub.utils import yaml_dump

    words = []
    if command:
        words.append(fenced(command, "bash"))
    if isinstance(recipe, Recipe) and not recipe.pooled and None not in recipe.stitches:
        words.append("Or, with images of the task, in Python:" if command else "With images of the task:")
        words.append(fenced(_composing(recipe), "python"))
    words.append(
        "<details><summary>The recipe, from which its structure is built</summary>\n\n"
        f"{fenced(yaml_dump(shown_recipe(recipe)).rstrip(), 'yaml')}\n\n</details>"
    )
    return "\n\n".join(words)


def _pinned(ref: SourceRef) -> str:
    """What to give `load_sources` for the same weights."""
    repo = hub_name(ref)
    # Some of timm's weights are in repositories of another layout, which only timm's own names lead to.
    pinned = ref.revision and repo and (ref.spec.startswith("hf-hub:") or repo.endswith(f"/{ref.architecture}"))
    spec = f"hf-hub:{repo}@{ref.revision}" if pinned else shown_spec(ref)
    options: dict[str, Any] = {"spec": spec}
    if ref.name != re.split("[/:]", spec.partition("@")[0])[-1]:
        options["name"] = ref.name
    if ref.arguments:
        options["arguments"] = ref.arguments
    return repr(options if len(options) > 1 else spec)


def _composing(recipe: Recipe) -> str:
    """The same network, made by hand."""
    sources = "".join(f"    {_pinned(ref)},\n" for ref in recipe.sources)
    pieces = "".join(f"    {(f.source, f.start, f.end)!r},\n" for f in recipe.fragments)
    refined = f", refinements={list(recipe.refinements)}" if recipe.refinements else ""
    shared = ", share_weights=True" if recipe.share_weights else ""
    until = ', until="output"' if recipe.fragments[-1].end is None else ""
    return "\n".join(
        (
            "import lightning_stitch as ls",
            "",
            f'settings = ls.CalibrationSettings(granularity="all"{until})',
            f"sources = ls.load_sources([\n{sources}])",
            f"pool = ls.Pool(sources, {recipe.input_size}, settings=settings)",
            "pool.calibrate(batches)  # floats in [0, 1], not normalised",
            f"found = pool.stitch([\n{pieces}]{refined})",
            f"network = pool.assemble(found{shared})",
        )
    )
