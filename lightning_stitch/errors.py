"""What can go wrong, in the user's words: one base class and one class for each thing that a user hands over."""


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
