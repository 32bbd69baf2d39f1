"""What candidates gave, for rankings; candidates run and assembled without a pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_stitch.io.journal import Answers
from lightning_stitch.networks.network import StitchedNetwork, assemble
from lightning_stitch.recipe import Recipe
from lightning_stitch.search.evaluation import Outcome, outcomes
from lightning_stitch.search.ranking import SelectionData
from lightning_stitch.stitching.candidates import Candidate, tree_of
from lightning_stitch.stitching.segments import Segmented


def outcome_of(features: Tensor, key: str = "") -> Outcome:
    """What a candidate of one tap gave."""
    return Outcome((features,), (key,), None, 0.0)


def selection_of(
    features: Sequence[Tensor], targets: Tensor | None, own_features: Sequence[Tensor], num_classes: int | None
) -> SelectionData:
    """Candidates of one tap, each with the features of the source that it ends in; sources are told by the latter."""
    names = {id(x): str(number) for number, x in enumerate(own_features)}
    return SelectionData(
        [outcome_of(x, str(number)) for number, x in enumerate(features)],
        targets,
        [names[id(x)] for x in own_features],
        {names[id(x)]: outcome_of(x) for x in own_features},
        num_classes,
    )


def run_all(candidates: Sequence[Candidate], parts: Sequence[Segmented], batches: Iterable[Tensor]) -> list[Outcome]:
    """What candidates give for batches of images."""
    return outcomes(candidates, parts, batches, journal=Answers(), on_batch=lambda count: None)


def assembled(candidate: Candidate, parts: Sequence[Segmented], recipe: Recipe | None = None) -> StitchedNetwork:
    """A candidate as a network, by its recipe or one that is equal to it."""
    fragments = tree_of(candidate.ways, candidate.reads, parts).fragments
    return assemble(
        recipe or candidate.recipe,
        {part.name: part.graph for part in parts},
        [fragment.stitch for fragment in fragments],
        [fragment.tensors for fragment in fragments],
    )
