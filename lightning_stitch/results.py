"""What a search found, and whether it was worth it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_stitch.space import Candidate


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its place.

    Attributes:
        candidate: The candidate.
        scores: What the ranking measured on the selection images, by name.
        features: Width of its output.
        seconds: Wall time of running it over the selection images.
    """

    candidate: Candidate
    scores: dict[str, float]
    features: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: All candidates, the references among them, best first.
        best: The best that keeps the budget, an unmodified source where no other beat it.
        best_source: The best unmodified source, budget or no.
        best_self_stitched: The best source stitched to itself; None: none gave features to rank by.
        best_stitched: The best StitchNet within the budget; None: none was found.
        rejected: How many compositions were turned down, by reason.
        seconds: Wall time of each stage.
        num_selection_labels: Labels that the ranking used.
    """

    ranked: tuple[Ranked, ...]
    best: Ranked
    best_source: Ranked
    best_self_stitched: Ranked | None
    best_stitched: Ranked | None
    rejected: dict[str, int]
    seconds: dict[str, float]
    num_selection_labels: int

    def within(self, max_macs: float) -> Ranked | None:
        """The best StitchNet of at most that many MACs; None where there is none."""
        fitting = [r for r in self.ranked if r.candidate.kind == "stitched" and r.candidate.cost.macs <= max_macs]
        return next(iter(fitting), None)

    @property
    def beat_best_source(self) -> bool:
        """Whether the best candidate ranks before the best source, which may be over the budget."""
        return self.ranked.index(self.best) < self.ranked.index(self.best_source)

    def summary(self) -> str:
        """Whether the search was worth it, in one sentence, by the selection images alone."""
        name, value = next(iter(self.best.scores.items()))
        source = self.best_source.candidate.recipe.fragments[0].source
        reference = self.best_source.scores[name]
        if self.beat_best_source:
            return (
                f"The best candidate ({self.best.candidate.kind}, {self.best.candidate.cost}) has {name} {value:.4f} "
                f"on the selection images, the best source ({source}, {self.best_source.candidate.cost}) "
                f"{reference:.4f}."
            )
        if self.best is self.best_source:
            return (
                f"No candidate beat the best source on the selection images: {source} has {name} {reference:.4f}; "
                f"it is returned as it is."
            )
        return (
            f"No candidate within the budget beat the best source on the selection images: {source} "
            f"({self.best_source.candidate.cost}) has {name} {reference:.4f} but is over the budget; the best within "
            f"it ({self.best.candidate.kind}, {self.best.candidate.cost}) has {value:.4f}."
        )
