from __future__ import annotations

import itertools

import pytest

from lightning_stitch.licences import combine_licences


@pytest.mark.parametrize(
    ("licences", "governing"),
    [
        (["Apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0"], "apache-2.0"),
        (["MIT", "BSD-3-Clause"], "mit"),
        (["cc0-1.0", "mit", "GPL-3.0-or-later"], "gpl-3.0"),
        (["apache-2.0", "gpl-3.0"], "gpl-3.0"),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["apache-2.0", "openrail"], "openrail"),
        # both want the whole under their own terms, or one sells what the other does not let be sold
        (["gpl-3.0", "cc-by-sa-4.0"], None),
        (["gpl-3.0", "cc-by-nc-4.0"], None),
        (["cc-by-nc-4.0", "openrail"], None),
        # the one's patent terms are more than the other allows to ask for
        (["apache-2.0", "gpl-2.0"], None),
    ],
)
def test_the_licence_that_keeps_all_terms_governs_in_any_order(licences: list[str], governing: str | None) -> None:
    for order in itertools.permutations(licences):
        found = combine_licences({str(number): word for number, word in enumerate(order)})
        # two that ask for the same are equally good
        assert found.name in ({"mit", "bsd-3-clause"} if governing == "mit" else {governing})
        assert not found.unknown
        assert not found.forbidding


@pytest.mark.parametrize("word", [None, "", "my-own-terms"])
def test_an_unknown_licence_leaves_the_whole_open(word: str | None) -> None:
    found = combine_licences({"a": "mit", "b": word})
    assert (found.name, found.unknown) == (None, ("b",))
    assert f"'b' ({word or 'none given'}) is not known" in found.why


@pytest.mark.parametrize("word", ["CC-BY-ND-4.0", "cc-by-nc-nd-4.0", "proprietary"])
def test_a_licence_that_forbids_it_is_named_though_others_are_unknown(word: str) -> None:
    found = combine_licences({"a": "mit", "b": word, "c": None})
    assert (found.name, found.forbidding) == (None, ("b",))
    assert "'b'" in found.why
