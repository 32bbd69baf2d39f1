from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from doubles.pools import bare_candidate

from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec, Tap
from lightning_stitch.report.kinds import _WORDS, RIVALS, UNDER_BUDGETS, is_composition, label_of, row_name
from lightning_stitch.stitching.candidates import Candidate

STITCH = StitchSpec("NCHW", "NCHW", 4, 4, (8, 8), (8, 8))


def candidate(kind: Any, *fragments: FragmentRef) -> Candidate:
    plain = bare_candidate()
    names = dict.fromkeys(fragment.source for fragment in fragments)
    sources = tuple(dataclasses.replace(plain.recipe.sources[0], name=name) for name in names)
    parents = {fragment.parent for fragment in fragments}
    ends = [number for number in range(len(fragments)) if number not in parents]
    recipe = Recipe(sources, fragments, tuple(Tap(number, 4) for number in ends), (3, 8, 8))
    return dataclasses.replace(plain, recipe=recipe, kind=kind)


def whole(name: str) -> FragmentRef:
    return FragmentRef(name, None, None)


def tail(name: str) -> FragmentRef:
    return FragmentRef(name, "layer2", None, 0, STITCH)


@pytest.mark.parametrize(
    ("one", "name", "label"),
    [
        (candidate("source", whole("a")), "a", "a"),
        (candidate("early exit", FragmentRef("a", None, "layer1")), "a", "a ended at layer1"),
        (candidate("stitched", whole("a"), tail("b")), "StitchNet", "StitchNet of a and b"),
        (candidate("shortened", whole("a"), tail("a")), "a", "a shortened"),
        (candidate("self-stitched", whole("a"), tail("a")), "a", "a stitched to itself"),
        (candidate("side by side", whole("a"), whole("b"), whole("c")), "side by side", "a, b and c side by side"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_network_is_called_what_it_is_made_of(one: Candidate, name: str, label: str) -> None:
    assert (row_name(one), label_of(one)) == (name, label)
    assert is_composition(one) is (one.kind in ("stitched", "side by side"))


def test_every_kind_that_is_compared_has_words() -> None:
    assert set(UNDER_BUDGETS) | set(RIVALS) <= set(_WORDS)
