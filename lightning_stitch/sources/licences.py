"""Which licence a network has that is made of parts of others: the most restrictive one, where that can be told.

A table of a few dozen well-known licences and simple rules over it. It is no legal advice: what it cannot decide it
leaves open and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# What a licence asks for. "same": what is made of it comes under the same licence. "no derivatives" and "no sharing":
# what is made of it may not be given to others.
Condition = Literal[
    "name the author", "say what changed", "share its own files", "same", "not for sale", "use limits",
    "no derivatives", "no sharing",
]  # fmt: skip

_NAMED: frozenset[Condition] = frozenset({"name the author"})
_CHANGED: frozenset[Condition] = _NAMED | {"say what changed"}
_FILES: frozenset[Condition] = _CHANGED | {"share its own files"}
_SAME: frozenset[Condition] = _FILES | {"same"}

_CONDITIONS: dict[str, frozenset[Condition]] = {
    **dict.fromkeys(("cc0-1.0", "unlicense", "pddl", "pddl-1.0", "wtfpl", "0bsd"), frozenset()),
    **dict.fromkeys(("mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0"), _NAMED),
    **dict.fromkeys(("apache-2.0", "odc-by", "odc-by-1.0", "cdla-permissive-2.0"), _CHANGED),
    **dict.fromkeys(("mpl-2.0", "epl-2.0", "lgpl", "lgpl-2.1", "lgpl-3.0"), _FILES),
    **dict.fromkeys(("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "odbl", "odbl-1.0"), _SAME),
    **dict.fromkeys(("openrail", "creativeml-openrail-m", "bigscience-openrail-m"), _CHANGED | {"use limits"}),
    **dict.fromkeys(("proprietary", "all-rights-reserved", "no-sharing"), frozenset({"no sharing"})),
}
# Creative Commons' licences of every version and country, or of none that is named: cc-by-nc-sa-3.0-igo.
_CREATIVE_COMMONS = re.compile(r"cc-by((?:-(?:nc|sa|nd))*)(?:-\d(?:\.\d)?(?:-[a-z]{2,3})?)?")
# Whatever else the words say.
_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)|no-?deriv")
# What the hub takes as a card's `license`, of the licences that are more than one network's own.
_HUB_WORDS = """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr
"""
_FORBIDS: frozenset[Condition] = frozenset({"no derivatives", "no sharing"})
# Licences of which neither governs the other, though the table of conditions alone would say so.
_AT_ODDS = frozenset({frozenset({"apache-2.0", "gpl-2.0"})})


@dataclass(frozen=True, slots=True)
class CombinedLicence:
    """The licence of a network, derived from those of its sources.

    Attributes:
        name: The licence that fulfils what all of them ask for; None: it cannot be told.
        sources: Each source's licence as it says itself, by the source's name; None: it says nothing.
        unknown: Names of sources whose licence is missing or not in the table.
        forbidding: Names of sources whose licence forbids to share what is made of them.
        why: In a sentence, how the licence came about.
    """

    name: str | None
    sources: dict[str, str | None]
    unknown: tuple[str, ...]
    forbidding: tuple[str, ...]
    why: str


def combine_licences(licences: Mapping[str, str | None]) -> CombinedLicence:
    """The most restrictive of several licences, if one of them fulfils what all of them ask for.

    Args:
        licences: SPDX identifiers or the hub's words, in any case, by the sources' names; None: not known.

    Returns:
        What can be said. Two licences that both want all that is made of them under their own terms cannot be met at
        once, and an unknown one may ask for anything: then there is no name.

    Example:
        >>> combine_licences({"a": "MIT", "b": "Apache-2.0"}).name
        'apache-2.0'
        >>> combine_licences({"a": "gpl-3.0", "b": "cc-by-nc-4.0"}).name is None
        True
    """
    words = {name: _word(licence) for name, licence in licences.items()}
    unknown = tuple(name for name, word in words.items() if _conditions(word) is None)
    forbidding = tuple(name for name, word in words.items() if (_conditions(word) or frozenset()) & _FORBIDS)
    found: str | None = None
    if forbidding:
        why = f"{_listed(forbidding, words)} may not be shared in changed form."
    elif unknown:
        why = f"The licence of {_listed(unknown, words)} is not known, so that of the whole cannot be told."
    else:
        distinct = list(dict.fromkeys(str(word) for word in words.values()))
        found = next((word for word in distinct if all(_covers(word, other) for other in distinct)), None)
        if found is None:
            why = f"None of {', '.join(distinct)} fulfils what all of them ask for."
        elif len(distinct) == 1:
            why = f"All sources are under {found}."
        else:
            why = f"{found} asks for most among {', '.join(distinct)}."
    return CombinedLicence(found, dict(licences), unknown, forbidding, why)


def hub_words(licence: str | None) -> tuple[str, str | None]:
    """A licence as a card's metadata name it, where the hub takes no other words than its own.

    Args:
        licence: SPDX identifier, the hub's word, or free text; None: it cannot be told.

    Returns:
        `license` and `license_name`; the second is None where the first says it.

    Example:
        >>> hub_words("MIT"), hub_words("My own, see below")
        (('mit', None), ('other', 'my-own-see-below'))
    """
    word = _word(licence)
    if word is None:
        return "other", "see-sources"
    if word in _HUB_WORDS.split():
        return word, None
    return "other", re.sub("[^a-z0-9.]+", "-", word).strip("-.")[:64] or "see-card"


def _covers(word: str, other: str) -> bool:
    """Whether what is under the first licence keeps the terms of the other."""
    if word == other:
        return True
    if frozenset({word, other}) in _AT_ODDS:
        return False
    asked, kept = _conditions(other), _conditions(word)
    return asked is not None and kept is not None and "same" not in asked and asked <= kept


def _conditions(word: str | None) -> frozenset[Condition] | None:
    """What a licence asks for; None: it is not known."""
    if word is None or word in _CONDITIONS:
        return _CONDITIONS.get(str(word))
    if match := _CREATIVE_COMMONS.fullmatch(word):
        parts = match[1].split("-")
        found = _SAME if "sa" in parts else _CHANGED
        found |= {"not for sale"} if "nc" in parts else frozenset()
        return found | ({"no derivatives"} if "nd" in parts else frozenset())
    return frozenset({"no derivatives"}) if _NO_DERIVATIVES.search(word) else None


def _word(licence: str | None) -> str | None:
    """As the hub writes it."""
    if licence is None or not licence.strip():
        return None
    word = re.sub(r"[\s_-]+", "-", licence.strip().lower())
    return re.sub(r"-only$|-or-later$|(?<=\d)\+$", "", word)


def _listed(names: Iterable[str], words: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name!r} ({words[name] or 'none given'})" for name in names)
