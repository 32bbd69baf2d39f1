"""Run many candidates over the same images at once.

Candidates that begin alike share their front: the set of candidates is a prefix tree, and each of its nodes runs once
for a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from lightning_stitch.cutting import with_tensors
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Answer, Answers, tensors_hash
from lightning_stitch.stitching import Candidate, Segmented, chunks


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
                    key: tuple[object, ...] = ("stitch", step.source, step.first, step.key)
                    node = node.children.setdefault(key, _Node(step.stitch))
                for piece in range(step.first, step.last):
                    key = ("piece", step.source, piece, step.key)
                    if key not in node.children:
                        node.children[key] = _Node(with_tensors(parts[step.source].pieces[piece], step.tensors))
                    node = node.children[key]
            if candidate.pool is not None:
                node = node.children.setdefault(("pool",), _Node(candidate.pool))
            node.ends.append(index)

    def run(self, images: Iterable[Tensor]) -> list[Outcome]:
        """Run all candidates over the images.

        Args:
            images: Batches (batch, channels, height, width) in [0, 1].

        Returns:
            One outcome for each candidate, in their order.
        """
        found: list[list[Tensor]] = [[] for _ in range(self.num_candidates)]
        for batch in images:
            with torch.inference_mode():
                for chunk in chunks(batch, self._images_at_once):
                    for root in self._roots.values():
                        self._descend(root, chunk, found)
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
        total, node.seconds = before + node.seconds, 0.0
        for index in node.ends:
            seconds[index] = total
        for child in node.children.values():
            self._add_seconds(child, total, seconds)


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
    keys = [candidate.key for candidate in candidates]

    @lru_cache(maxsize=1)
    def tree_of(places: tuple[int, ...]) -> PrefixTree:
        return PrefixTree([candidates[place] for place in places], parts)

    def run(batch: Tensor, places: Sequence[int]) -> list[Answer]:
        return [Answer(one.seconds, {"features": one.features}) for one in tree_of(tuple(places)).run([batch])]

    answers: list[list[Answer]] = []
    for number, batch in enumerate(images):
        content = tensors_hash([batch])
        journal.agree({f"selection images, batch {number}": [list(batch.shape), content]})
        answers.append(journal.recall_all([["features", number, content, key] for key in keys], partial(run, batch)))
        on_batch(len(batch))
    if not answers:
        raise CalibrationError("There are no images to run the candidates on.")
    return [
        Outcome(torch.cat([answer.tensors["features"] for answer in of_one]), sum(answer.value for answer in of_one))
        for of_one in zip(*answers, strict=True)
    ]
