"""Which licence a network has that is made of parts of others: that of all of them, where they have the same.

No legal advice: which of several licences governs the whole is left open and said so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
# Others that are known. Creative Commons' come of every version and country, or of none that is named:
# cc-by-nc-sa-3.0-igo.
_OTHER_WORDS = "0bsd pddl-1.0 odc-by-1.0 odbl-1.0 proprietary all-rights-reserved no-sharing"
_CREATIVE_COMMONS = re.compile(r"cc-by((?:-(?:nc|sa|nd))*)(?:-\d(?:\.\d)?(?:-[a-z]{2,3})?)?")
# What a licence forbids, by what stands in its name.
_FORBIDDEN = {
    "derivatives": re.compile(r"(?:^|-)nd(?:-|$)|no-?deriv"),
    "sharing": re.compile(r"^(proprietary|all-rights-reserved|no-sharing)$"),
    "commercial use": re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial"),
}


@dataclass(frozen=True, slots=True)
class CombinedLicence:
    """The licence of a network (None: several, or it cannot be told), from those of its sources, and in words why.

    `unknown` names the sources whose licence is missing or not a well-known one, `forbidding` those whose licence
    forbids to share what is made of them.
    """

    name: str | None
    unknown: tuple[str, ...]
    forbidding: tuple[str, ...]
    why: str


def combine_licences(licences: Mapping[str, str | None]) -> CombinedLicence:
    """The licence of what is made of several sources, if all of them have the same and may be shared.

    Licences are SPDX identifiers or the hub's words, in any case, by the sources' names.

    Example:
        >>> combine_licences({"a": "MIT", "b": "mit"}).name
        'mit'
        >>> combine_licences({"a": "mit", "b": "apache-2.0"}).why
        "The sources are under several licences: 'a' (mit), 'b' (apache-2.0)."
    """
    words = {name: _word(licence) for name, licence in licences.items()}
    forbidding = tuple(
        name for name, licence in licences.items() if {"derivatives", "sharing"} & set(forbidden_by(licence))
    )
    unknown = tuple(name for name, word in words.items() if name not in forbidding and not _is_known(word))
    licence: str | None = None
    if forbidding:
        why = f"{_quote(forbidding, words)} may not be shared in changed form."
    elif unknown:
        why = f"The licence of {_quote(unknown, words)} is not known, so that of the whole cannot be told."
    elif len(set(words.values())) == 1:
        licence = next(iter(words.values()))
        why = f"All sources are under {licence}."
    else:
        why = f"The sources are under several licences: {_quote(words, words)}."
    return CombinedLicence(licence, unknown, forbidding, why)


def forbidden_by(licence: str | None) -> list[str]:
    """What a licence's name says that it forbids: "derivatives", "sharing", "commercial use".

    Example:
        >>> forbidden_by("CC BY-NC-ND 4.0")
        ['derivatives', 'commercial use']
    """
    return [use for use, words in _FORBIDDEN.items() if words.search(_word(licence) or "")]


def hub_words(licence: str | None) -> tuple[str, str | None]:
    """A licence as a card's `license` and `license_name`; the second is None where the first says it.

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


def _is_known(word: str | None) -> bool:
    return word is not None and (
        word in _HUB_WORDS.split() or word in _OTHER_WORDS.split() or bool(_CREATIVE_COMMONS.fullmatch(word))
    )


def _word(licence: str | None) -> str | None:
    if licence is None or not licence.strip():
        return None
    word = re.sub(r"[\s_-]+", "-", licence.strip().lower())
    return re.sub(r"-only$|-or-later$|(?<=\d)\+$", "", word)


def _quote(names: Iterable[str], words: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name!r} ({words[name] or 'none given'})" for name in names)
