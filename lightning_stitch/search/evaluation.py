"""Run many candidates over the same images at once.

Candidates that begin alike share their front: the set of candidates is a prefix tree, and each of its nodes runs once
for a batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_stitch.cutting import with_tensors
from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing import Healer
from lightning_stitch.io import key_of, tensors_hash
from lightning_stitch.recipe import Recipe
from lightning_stitch.search.journal import Answer, Answers, NoJournal, answered
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate, Segmented, Stitch, chunks


@dataclass(slots=True)
class _Node:
    """One piece or stitch, its own time, the candidates that end here and the nodes behind."""

    run: Callable[[Tensor], Tensor] | None
    seconds: float = 0.0
    ends: list[int] = field(default_factory=list)
    children: dict[tuple[object, ...], _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one candidate gave.

    Attributes:
        features: (images, features), float32, on the CPU.
        seconds: Wall time of its own nodes, shared ones included: what it would have cost alone.
    """

    features: Tensor
    seconds: float


class PrefixTree:
    """Candidates as a prefix tree.

    Args:
        candidates: The candidates.
        parts: The sources that their steps refer to.
    """

    def __init__(self, candidates: Sequence[Candidate], parts: Sequence[Segmented]) -> None:
        self.parts = parts
        self.num_candidates = len(candidates)
        self._images_at_once = min(part.images_at_once for part in parts)
        self._roots: dict[int, _Node] = {}
        for index, candidate in enumerate(candidates):
            first = candidate.steps[0].source
            node = self._roots.setdefault(first, _Node(parts[first].preprocess))
            for step in candidate.steps:
                if step.stitch is not None:
                    node = self._stitch(node, step.stitch)
                for piece in range(step.first, step.last):
                    own = parts[step.source].pieces[piece]
                    # The same numbers mean the same mapping: each healing makes one of its own.
                    key = ("piece", step.source, piece, id(step.tensors) if step.tensors else None)
                    if key not in node.children:
                        node.children[key] = _Node(with_tensors(own, step.tensors))
                    node = node.children[key]
            if candidate.pool is not None:
                node = node.children.setdefault(("pool",), _Node(candidate.pool))
            node.ends.append(index)

    @staticmethod
    def _stitch(node: _Node, stitch: Stitch) -> _Node:
        # The same stitch object means the same path: a search fits each only once.
        return node.children.setdefault(("stitch", id(stitch)), _Node(stitch))

    def run(self, images: Iterable[Tensor], *, on_batch: Callable[[int], None] | None = None) -> list[Outcome]:
        """Run all candidates over the images.

        Args:
            images: Batches (batch, channels, height, width) in [0, 1].
            on_batch: Called with the number of images after each batch.

        Returns:
            One outcome for each candidate, in their order.
        """
        found: list[list[Tensor]] = [[] for _ in range(self.num_candidates)]
        for batch in images:
            with torch.inference_mode():
                for chunk in chunks(batch, self._images_at_once):
                    for root in self._roots.values():
                        self._descend(root, chunk, found)
            if on_batch is not None:
                on_batch(len(batch))
        if self.num_candidates and not found[0]:
            raise CalibrationError("There are no images to run the candidates on.")
        seconds = [0.0] * self.num_candidates
        for root in self._roots.values():
            self._add_seconds(root, 0.0, seconds)
        # Joined outside of inference mode, these are ordinary tensors again, on which a head can be fitted and trained.
        return [Outcome(torch.cat(batches), own) for batches, own in zip(found, seconds, strict=True)]

    def _descend(self, node: _Node, x: Tensor, found: list[list[Tensor]]) -> None:
        begun = time.perf_counter()
        assert node.run is not None
        x = node.run(x)
        node.seconds += time.perf_counter() - begun
        for index in node.ends:
            found[index].append(x.float().cpu())
        for child in node.children.values():
            self._descend(child, x, found)

    def _add_seconds(self, node: _Node, before: float, seconds: list[float]) -> None:
        total = before + node.seconds
        for index in node.ends:
            seconds[index] = total
        for child in node.children.values():
            self._add_seconds(child, total, seconds)


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


class RememberingHealer(Healer):
    """As a healer, but what the journal has is taken from there.

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

    def heal(self, candidate: Candidate) -> Candidate:
        """The candidate healed, or as it is."""
        if isinstance(self.journal, NoJournal):
            return super().heal(candidate)
        question, heal = ["healed", *candidate_keys([candidate])], super().heal
        found = answered(self.journal, question, lambda: _difference(candidate, heal(candidate)))
        return candidate if found.value is None else _rebuilt(candidate, found)

    def explained(self, candidate: Candidate) -> float | None:
        """Held-out R2 of a candidate as it is."""
        question, explain = ["explained", *candidate_keys([candidate])], super().explained
        found: float | None = answered(self.journal, question, lambda: Answer(explain(candidate))).value
        return found


def _rebuilt(candidate: Candidate, answer: Answer) -> Candidate:
    """What healing made of a candidate, as `_difference` noted it."""
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
