from __future__ import annotations

import itertools

import pytest

from lightning_stitch.sources.licences import combine_licences, forbidden_by, hub_words


@pytest.mark.parametrize(
    ("licences", "name"),
    [
        (["Apache-2.0", "apache-2.0"], "apache-2.0"),
        (["GPL-3.0-or-later", "gpl-3.0"], "gpl-3.0"),
        (["GPL-2.0+", "gpl-2.0-only"], "gpl-2.0"),
        # of every version and country, or of none
        (["CC-BY-NC"], "cc-by-nc"),
        (["CC BY 4.0", "cc-by-4.0"], "cc-by-4.0"),
        (["CC-BY-NC-SA-3.0-IGO"], "cc-by-nc-sa-3.0-igo"),
        (["ODbL-1.0"], "odbl-1.0"),
        (["mit", "apache-2.0"], None),
        (["gpl-3.0", "cc-by-sa-4.0"], None),
        (["cc-by-sa-2.0", "cc-by-sa-4.0"], None),
    ],
)
def test_the_licence_that_all_sources_have_is_the_wholes(licences: list[str], name: str | None) -> None:
    for order in itertools.permutations(licences):
        whole = combine_licences({str(number): word for number, word in enumerate(order)})
        assert whole.name == name
        assert not whole.unknown
        assert not whole.forbidding


def test_several_licences_are_listed_with_their_sources() -> None:
    whole = combine_licences({"a": "MIT", "b": "cc-by-nc-4.0", "c": "mit"})
    assert whole.why == "The sources are under several licences: 'a' (mit), 'b' (cc-by-nc-4.0), 'c' (mit)."


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
    assert (found.name, found.unknown, found.forbidding) == (None, ("c",), ("b",))
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


@pytest.mark.parametrize(
    ("licence", "uses"),
    [
        (None, []),
        ("mit", []),
        ("cc_by_nc_sa_4.0", ["commercial use"]),
        ("CC-BY-NC-ND-4.0", ["derivatives", "commercial use"]),
        ("All Rights Reserved", ["sharing"]),
        ("nvidia-open", []),
    ],
)
def test_what_a_licence_forbids_is_read_from_its_name(licence: str | None, uses: list[str]) -> None:
    assert forbidden_by(licence) == uses
