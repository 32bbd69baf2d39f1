from __future__ import annotations

import itertools

import pytest

from lightning_stitch.sources.licences import combine_licences, hub_words


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
        # of every version and country, or of none
        (["apache-2.0", "CC-BY-NC"], "cc-by-nc"),
        (["mit", "CC-BY-NC-2.5"], "cc-by-nc-2.5"),
        (["mit", "cc-by-sa-2.0"], "cc-by-sa-2.0"),
        (["mit", "CC-BY-2.5"], "cc-by-2.5"),
        (["mit", "CC BY 4.0"], "cc-by-4.0"),
        (["cc-by", "CC-BY-NC-SA-3.0-IGO"], "cc-by-nc-sa-3.0-igo"),
        (["cc-by-sa-2.0", "cc-by-sa-4.0"], None),
        (["mit", "GPL-2.0+"], "gpl-2.0"),
        (["mit", "ODbL-1.0"], "odbl-1.0"),
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


@pytest.mark.parametrize("word", [None, "", "my-own-terms", "weekend-2.0", "cc-by-zz-4.0"])
def test_an_unknown_licence_leaves_the_whole_open(word: str | None) -> None:
    found = combine_licences({"a": "mit", "b": word})
    assert (found.name, found.unknown) == (None, ("b",))
    assert f"'b' ({word or 'none given'}) is not known" in found.why


@pytest.mark.parametrize(
    "word",
    [
        *(
            "CC-BY-ND-4.0",
            "cc-by-nc-nd-4.0",
            "proprietary",
            "cc-by-nd-3.0",
            "cc-by-nc-nd-2.0",
            "CC-BY-ND",
            "CC BY-NC-ND",
        ),
        *("CC-BY-NC-ND-3.0-IGO", "CC-BY-ND-2.5", "cc_by_nd_4.0", "my-nd-1.0", "Attribution-NoDerivatives 4.0"),
    ],
)
def test_a_licence_that_forbids_it_is_named_though_others_are_unknown(word: str) -> None:
    found = combine_licences({"a": "mit", "b": word, "c": None})
    assert (found.name, found.forbidding) == (None, ("b",))
    assert "'b'" in found.why


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("MIT", ("mit", None)),
        ("openrail++", ("openrail++", None)),
        ("GPL-3.0-or-later", ("gpl-3.0", None)),
        ("CC-BY-NC", ("other", "cc-by-nc")),
        ("My own: ask *me*", ("other", "my-own-ask-me")),
        ("\u00e9", ("other", "see-card")),
        (None, ("other", "see-sources")),
    ],
)
def test_a_card_names_a_licence_in_words_that_the_hub_takes(licence: str | None, words: tuple[str, str | None]) -> None:
    assert hub_words(licence) == words
