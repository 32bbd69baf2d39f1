from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from doubles.staged import recipe_of_stages

from lightning_stitch.errors import RecipeError
from lightning_stitch.recipe import Average, FragmentRef, Preprocessing, Recipe, SourceRef, StitchSpec


def source(name: str = "a", **options: Any) -> SourceRef:
    preprocessing = Preprocessing((3, 32, 24), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic", fixed_size=name == "b")
    fields = {"arguments": {"widths": [1, 2], "act": "relu"}, "revision": "main", "licence": "mit", **options}
    return SourceRef(name, f"timm:{name}", "timm", f"net_{name}", "sha256:0", preprocessing, **fields)


STITCH = StitchSpec("tokens", "NCHW", 6, 4, (7, 7), (14, 14), in_prefix_tokens=1, placement="producer", cka=0.5, rank=6)
VECTOR_STITCH = StitchSpec("NCHW", "vector", 4, 8, (14, 14), None, out_prefix_tokens=0, bias=False, r2=0.25)


def recipe(**options: Any) -> Recipe:
    """Two sources, four fragments; at cut "y" the second one simply goes on."""
    fields: dict[str, Any] = {
        "sources": (source("a"), source("b", licence=None)),
        "fragments": (
            FragmentRef("b", None, "x"),
            FragmentRef("a", "w", "y"),
            FragmentRef("a", "y", "z"),
            FragmentRef("b", "v", None),
        ),
        "stitches": (STITCH, None, VECTOR_STITCH),
        "num_features": 5,
        "input_size": (3, 64, 48),
        "scores": {"cka_product": 0.125, "macs": 1e9},
    }
    return Recipe.chain(**{**fields, **options})


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    plain = recipe().to_dict()
    change(plain)
    return plain


def stitch(plain: dict[str, Any], fragment: int = 1) -> dict[str, Any]:
    spec: dict[str, Any] = plain["fragments"][fragment]["stitch"]
    return spec


def test_a_recipe_survives_json() -> None:
    plain = recipe().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert Recipe.from_dict(json.loads(json.dumps(plain))) == recipe()


def test_a_recipe_from_before_weights_could_be_shared_shares_none() -> None:
    shared = recipe(share_weights=True).to_dict()
    assert Recipe.from_dict(shared).share_weights
    del shared["share_weights"]
    assert Recipe.from_dict(shared) == recipe(share_weights=False)


def test_a_recipe_of_one_whole_source_survives_json() -> None:
    whole = Recipe.chain((source(),), (FragmentRef("a", None, None),), num_features=5, input_size=(3, 32, 24))
    assert Recipe.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_reading_a_recipe_changes_nothing_in_what_was_read() -> None:
    plain = recipe().to_dict()
    before = copy.deepcopy(plain)
    Recipe.from_dict(plain)
    assert plain == before


@pytest.mark.parametrize("part", [recipe(), source(), source().preprocessing, STITCH, FragmentRef("a", None, None)])
def test_every_part_is_frozen(part: Any) -> None:
    name = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, name, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fragments": (), "stitches": ()}, "needs at least one fragment and one tap; this one has 0 and"),
        ({"stitches": (STITCH, None)}, r"chain of 4 fragments has 3 stitches between them; found 2"),
        ({"sources": (source("b"), source("b"))}, r"Two sources of a recipe share a name: \['b', 'b'\]"),
        ({"sources": (source("b"), source("c"))}, r"refer to \['a'\], but the recipe's sources are \['b', 'c'\]"),
        (
            {"fragments": (FragmentRef("a", "w", None),), "stitches": ()},
            "begins at the image, without a stitch; found a: w .. output",
        ),
        (
            {"stitches": (None, None, VECTOR_STITCH)},
            "Nothing joins b: image .. x to a: w .. y: .*meet at one cut",
        ),
        ({"stitches": (STITCH, None, None)}, "Nothing joins a: y .. z to b: v .. output"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(schema=4), "has schema 4; this version of lightning_stitch reads schema 3. Upgrade"),
        (lambda p: p.pop("schema"), "has schema None"),
        (lambda p: p.pop("fragments"), "no recipe of schema 3: .*'fragments'"),
        (lambda p: p["sources"][0].pop("preprocessing"), "'preprocessing'"),
        (lambda p: p["fragments"][1].pop("start"), "start"),
        (lambda p: p.update(weights=[]), "weights"),
        (lambda p: stitch(p).update(colour="red"), "colour"),
        (lambda p: p.update(fragments=None), "Recipe.fragments is None; expected tuple"),
        (
            lambda p: p["sources"][0].update(preprocessing=[3, 32, 32]),
            r"SourceRef.preprocessing is \[3, 32, 32\]; expected Preprocessing",
        ),
        (lambda p: p["sources"][0].update(builder="pip"), r"SourceRef.builder is 'pip'; expected Literal\['timm', "),
        (
            lambda p: p["fragments"][1]["stitch"].update(placement="left"),
            r"placement is 'left'; expected Literal\['explicit', ",
        ),
        (
            lambda p: p["fragments"][1]["stitch"].update(in_format="HWC"),
            r"StitchSpec.in_format is 'HWC'; expected .*'NHWC'",
        ),
        (lambda p: stitch(p, 3).update(out_channels="8"), "out_channels is '8'; expected int"),
        (lambda p: stitch(p, 3).update(out_channels=True), "out_channels is True; expected int"),
        (
            lambda p: p["fragments"][1]["stitch"].update(in_size=[7]),
            r"in_size is \[7\]; expected tuple\[int, int\] \| None",
        ),
        (lambda p: stitch(p).update(cka="high"), r"cka is 'high'; expected float \| None"),
        (
            lambda p: p["sources"][0]["preprocessing"].update(mean=[0, "1"]),
            r"mean is \[0, '1'\]; expected tuple\[float",
        ),
        (lambda p: p["fragments"][0].update(source=3), "FragmentRef.source is 3; expected str"),
        (lambda p: p.update(input_size=[3, 64]), r"Recipe.input_size is \[3, 64\]"),
        (lambda p: p.update(share_weights="yes"), "Recipe.share_weights is 'yes'; expected bool"),
        (lambda p: p["scores"].update(macs="many"), r"Recipe.scores is .*'many'.*; expected dict\[str, float\]"),
        (lambda p: p["fragments"][1].update(stitch=None), "Nothing joins"),
    ],
)
def test_what_is_no_recipe_is_refused_by_the_field(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(edited(change))


def test_a_recipe_must_be_a_dict() -> None:
    with pytest.raises(RecipeError, match=r"A recipe is a dict as `Recipe.to_dict` makes it; found str"):
        Recipe.from_dict("recipe.json")  # type: ignore[arg-type]


STAGED = recipe_of_stages((4, 3, 5), goes_on=[(0.0, 0.0), (0.5, 0.25)], point=1)


def test_a_recipe_with_stages_survives_json_and_says_which_fragments_each_needs() -> None:
    plain = STAGED.to_dict()
    assert Recipe.from_dict(json.loads(json.dumps(plain))) == STAGED
    assert STAGED.fragment_stages == (0, 1, 2)
    assert STAGED.stage_blocks == ((4,), (4, 3), (4, 3, 5))
    assert recipe().fragment_stages == (0, 0, 0, 0)
    assert recipe().stage_blocks == (recipe().blocks,)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"taps": [3]}, "two stages or more"),
        ({"taps": [0, 2, 3]}, "two stages or more"),
        ({"taps": [2, 1, 3]}, "read ever more taps"),
        ({"taps": [1, 2, 4]}, "The last stage reads all 3 taps"),
        ({"macs": [10, 20]}, "Each of 3 stages has MACs"),
        ({"macs": [30, 20, 10]}, "ever more; found"),
        ({"point": 2}, "One of 2 settings is chosen; found number 2"),
        ({"figures": [{}]}, "Each of 3 stages has figures, or none has; found 1"),
        ({"points": []}, "One of 0 settings is chosen"),
        ({"points": [{"goes_on": [0.5], "mean_macs": 1.0, "scores": {}}], "point": 0}, "which share goes on"),
        ({"points": [{"goes_on": [0.5, 1.5], "mean_macs": 1.0, "scores": {}}], "point": 0}, "which share goes on"),
        ({"points": [{"goes_on": [0.5, 1.0], "mean_macs": "1", "scores": {}}], "point": 0}, "mean_macs is '1'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: dict[str, Any], words: str) -> None:
    plain = STAGED.to_dict()
    plain["stages"].update(stages)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(plain)


def test_nothing_is_averaged_and_staged_at_once() -> None:
    with pytest.raises(RecipeError, match="averages none"):
        dataclasses.replace(STAGED, average=Average(((0,), (1,)), 4, with_heads=True))
