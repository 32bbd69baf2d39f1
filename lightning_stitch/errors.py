"""What can go wrong, in the user's words: one base class and one class for each thing that a user hands over."""

import difflib
from collections.abc import Iterable


class StitchError(RuntimeError):
    """Base of every error that lightning_stitch raises on purpose."""


class SourceError(StitchError):
    """A source cannot be had: unknown name, missing weights, no network, unreadable folder."""


class CutError(StitchError):
    """A network cannot be traced or cut as asked, or a cut of that name does not exist."""


class CalibrationError(StitchError):
    """Images, labels or activations cannot be used: too few rows, NaN, constant, wrong channels, one class."""


class BudgetError(StitchError):
    """No network keeps the budget; the message names the cheapest one that was found and its cost."""


class RecipeError(StitchError):
    """A recipe is malformed, of another schema, or does not fit the weights or the builder at hand."""


class JournalError(StitchError):
    """A search's journal is another search's, cannot be read, or cannot be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The three most similar of the known words, quoted, best first."""
    return ", ".join(repr(name) for name in difflib.get_close_matches(word, list(known), n=3, cutoff=0.0))


def require_text(names: Iterable[str], what: str) -> None:
    """Refuse names that cannot be written as UTF-8, as of files whose names are bytes in another encoding."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise StitchError(f"{what} {name!a} is no text: it cannot be written as UTF-8. Rename it.") from None


def first_lines(error: BaseException) -> str:
    """The start of a long error; `load_state_dict` of a wrong file names hundreds of keys."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = [line if len(line) <= 200 else line[:200] + " ..." for line in lines[:4]]
    return f"{type(error).__name__}: {' '.join(shown)}{' ...' if len(lines) > 4 else ''}"
