"""What running candidates gives, from a search's journal as far as it goes: features of images, milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing.refinement import Refiner
from lightning_stitch.io.fingerprints import key_of, tensors_hash
from lightning_stitch.journal import Answer, Answers, NoJournal, answered
from lightning_stitch.prefix_tree import Outcome, PrefixTree
from lightning_stitch.recipe import Recipe
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.activations import Calibrated
from lightning_stitch.stitching.candidates import Candidate
from lightning_stitch.stitching.segments import Segmented
from lightning_stitch.stitching.stitches import Stitch


def candidate_keys(candidates: Iterable[Candidate]) -> list[str]:
    """A key for each candidate that says what it computes: its fragments, and all numbers that are not its sources'."""
    hashes: dict[int, str] = {}

    def numbers(stitch: torch.nn.Module | None) -> str | None:
        if stitch is None:
            return None
        if id(stitch) not in hashes:
            hashes[id(stitch)] = tensors_hash(stitch.state_dict().values())
        return hashes[id(stitch)]

    return [
        key_of(
            [(f.source, f.start, f.end) for f in candidate.recipe.fragments],
            [numbers(step.stitch) for step in candidate.steps],
            [
                [*sorted(step.tensors), tensors_hash(step.tensors[name] for name in sorted(step.tensors))]
                for step in candidate.steps
            ],
            candidate.pool is not None,
        )
        for candidate in candidates
    ]


def outcomes(
    candidates: Sequence[Candidate],
    parts: Sequence[Segmented],
    images: Iterable[Tensor],
    *,
    journal: Answers,
    on_batch: Callable[[int], None],
) -> list[Outcome]:
    """As `PrefixTree.run`, but what the journal has of a batch is taken from there, and what it has not recorded.

    Args:
        candidates: The candidates.
        parts: The sources that their steps refer to.
        images: Batches (batch, channels, height, width) in [0, 1].
        journal: What remembers them.
        on_batch: Called with the number of images after each batch.

    Raises:
        JournalError: If the journal was begun with other images, or in other batches.
        CalibrationError: If there are no images.
    """
    if isinstance(journal, NoJournal):
        return PrefixTree(candidates, parts).run(images, on_batch=on_batch)
    keys = candidate_keys(candidates)
    features: list[list[Tensor]] = [[] for _ in candidates]
    seconds = [0.0] * len(candidates)
    count = 0
    for number, batch in enumerate(images):
        content = tensors_hash([batch])
        journal.agree({f"selection images, batch {number}": [list(batch.shape), content]})
        question = ["features", number, content]
        known: dict[str, tuple[Tensor, float]] = {}
        for answer in journal.find(question):
            known |= {key: (answer.tensors[key], own) for key, own in answer.value.items()}
        missing = [index for index, key in enumerate(keys) if key not in known]
        if missing:
            found = PrefixTree([candidates[index] for index in missing], parts).run([batch])
            ran = {
                keys[index]: (outcome.features, outcome.seconds) for index, outcome in zip(missing, found, strict=True)
            }
            value = {key: own for key, (_, own) in ran.items()}
            journal.record(question, Answer(value, {key: x for key, (x, _) in ran.items()}))
            known |= ran
        for index, key in enumerate(keys):
            features[index].append(known[key][0])
            seconds[index] += known[key][1]
        count += len(batch)
        on_batch(len(batch))
    if not count:
        raise CalibrationError("There are no images to run the candidates on.")
    return [Outcome(torch.cat(batches), own) for batches, own in zip(features, seconds, strict=True)]


def milliseconds(journal: Answers, candidate: Candidate, measure: Callable[[], float]) -> float:
    """A candidate's measured latency.

    Args:
        journal: What remembers it.
        candidate: The candidate.
        measure: Measures it.
    """
    question = ["latency", *candidate_keys([candidate])]
    return float(answered(journal, question, lambda: Answer(measure())).value)


class RememberingRefiner(Refiner):
    """As a refiner, but what the journal has is taken from there.

    Args:
        journal: What remembers it.
        sources: The sources with their activations of the calibration images.
        settings: How rows are sampled.
        ridge: Strength of the stitches' fit.
    """

    def __init__(
        self, journal: Answers, sources: Sequence[Calibrated], *, settings: CalibrationSettings, ridge: float
    ) -> None:
        super().__init__(sources, settings=settings, ridge=ridge)
        self.journal = journal

    def refined(self, candidate: Candidate, name: str) -> Candidate:
        """The candidate with one change made, or as it is."""
        if isinstance(self.journal, NoJournal):
            return super().refined(candidate, name)
        question = ["refined", name, *candidate_keys([candidate])]
        refine = super().refined
        found = answered(self.journal, question, lambda: _difference(candidate, refine(candidate, name)))
        return candidate if found.value is None else _rebuilt(candidate, found)

    def explained(self, candidate: Candidate) -> float | None:
        """Held-out R2 of a candidate as it is."""
        question, explain = ["explained", *candidate_keys([candidate])], super().explained
        found: float | None = answered(self.journal, question, lambda: Answer(explain(candidate))).value
        return found


def _rebuilt(candidate: Candidate, answer: Answer) -> Candidate:
    """What a refinement made of a candidate, as `_difference` noted it."""
    recipe = Recipe.from_dict(answer.value["recipe"])
    steps = []
    for index, (step, spec) in enumerate(zip(candidate.steps, (None, *recipe.stitches), strict=True)):
        own = {name: answer.tensors[f"{index} {name}"] for name in answer.value["tensors"][index]}
        stitch = step.stitch
        if names := answer.value["stitches"][index]:
            assert spec is not None
            stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
            stitch.load_state_dict({name: answer.tensors[f"stitch {index} {name}"] for name in names})
            stitch.to(next(iter(step.stitch.state_dict().values())).device if step.stitch is not None else "cpu")
        steps.append(dataclasses.replace(step, spec=spec, stitch=stitch, tensors=own))
    return dataclasses.replace(candidate, recipe=recipe, steps=tuple(steps))


def _difference(candidate: Candidate, found: Candidate) -> Answer:
    """The new recipe, and the numbers of each step and of each stitch that is another, by name; None: not kept."""
    if found is candidate:
        return Answer(None)
    tensors = {f"{index} {key}": x for index, step in enumerate(found.steps) for key, x in step.tensors.items()}
    stitches: list[list[str]] = []
    for index, (before, step) in enumerate(zip(candidate.steps, found.steps, strict=True)):
        state = {} if step.stitch is None or step.stitch is before.stitch else step.stitch.state_dict()
        stitches.append(list(state))
        tensors |= {f"stitch {index} {key}": x for key, x in state.items()}
    value = {"recipe": found.recipe.to_dict(), "tensors": [list(s.tensors) for s in found.steps], "stitches": stitches}
    return Answer(value, tensors)
