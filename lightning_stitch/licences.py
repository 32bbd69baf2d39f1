"""Which licence a network has that is made of parts of others: the most restrictive one, where that can be told.

A table of a few dozen well-known licences and simple rules over it. It is no legal advice: what it cannot decide it
leaves open and says so.
"""

from __future__ import annotations

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
    **dict.fromkeys(("cc0-1.0", "unlicense", "pddl", "wtfpl", "0bsd"), frozenset()),
    **dict.fromkeys(("mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0"), _NAMED),
    **dict.fromkeys(("apache-2.0", "cc-by-4.0", "cc-by-3.0", "cc-by-2.0", "odc-by", "cdla-permissive-2.0"), _CHANGED),
    **dict.fromkeys(("mpl-2.0", "epl-2.0", "lgpl", "lgpl-2.1", "lgpl-3.0"), _FILES),
    **dict.fromkeys(("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "odbl"), _SAME),
    **dict.fromkeys(("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"), _CHANGED | {"not for sale"}),
    **dict.fromkeys(("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"), _SAME | {"not for sale"}),
    **dict.fromkeys(("openrail", "creativeml-openrail-m", "bigscience-openrail-m"), _CHANGED | {"use limits"}),
    **dict.fromkeys(("cc-by-nd-4.0",), _CHANGED | {"no derivatives"}),
    **dict.fromkeys(("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"), _CHANGED | {"no derivatives", "not for sale"}),
    **dict.fromkeys(("proprietary", "all-rights-reserved", "no-sharing"), frozenset({"no sharing"})),
}
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
    unknown = tuple(name for name, word in words.items() if word not in _CONDITIONS)
    forbidding = tuple(name for name, word in words.items() if _CONDITIONS.get(str(word), frozenset()) & _FORBIDS)
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


def _covers(word: str, other: str) -> bool:
    """Whether what is under the first licence keeps the terms of the other."""
    if word == other:
        return True
    if frozenset({word, other}) in _AT_ODDS:
        return False
    return "same" not in _CONDITIONS[other] and _CONDITIONS[other] <= _CONDITIONS[word]


def _word(licence: str | None) -> str | None:
    """As the hub writes it."""
    if licence is None or not licence.strip():
        return None
    word = licence.strip().lower().replace(" ", "-")
    for suffix in ("-only", "-or-later"):
        word = word.removesuffix(suffix)
    return word


def _listed(names: Iterable[str], words: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name!r} ({words[name] or 'none given'})" for name in names)
