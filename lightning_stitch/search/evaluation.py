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
    """One piece or stitch, the candidates that end here and the nodes behind."""

    run: Callable[[Tensor], Tensor]
    ends: list[int] = field(default_factory=list)
    children: dict[tuple[object, ...], _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one candidate gave: features (images, features), float32, on the CPU.

    `seconds` is the wall time of its own nodes, shared ones included: what it would have cost alone.
    """

    features: Tensor
    seconds: float


class PrefixTree:
    """Candidates as a prefix tree, over the sources that their steps refer to."""

    def __init__(self, candidates: Sequence[Candidate], parts: Sequence[Segmented]) -> None:
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
        """One outcome for each candidate, for batches of images (batch, channels, height, width) in [0, 1]."""
        features: list[list[Tensor]] = [[] for _ in range(self.num_candidates)]
        seconds = [0.0] * self.num_candidates

        def descend(node: _Node, x: Tensor, spent: float) -> None:
            begun = time.perf_counter()
            x = node.run(x)
            spent += time.perf_counter() - begun
            for index in node.ends:
                features[index].append(x.float().cpu())
                seconds[index] += spent
            for child in node.children.values():
                descend(child, x, spent)

        with torch.inference_mode():
            for batch in images:
                for chunk in chunks(batch, self._images_at_once):
                    for root in self._roots.values():
                        descend(root, chunk, 0.0)
        # Joined outside of inference mode, these are ordinary tensors again, on which a head can be fitted and trained.
        return [Outcome(torch.cat(portions), spent) for portions, spent in zip(features, seconds, strict=True)]


def outcomes(
    candidates: Sequence[Candidate],
    parts: Sequence[Segmented],
    images: Iterable[Tensor],
    *,
    journal: Answers,
    on_batch: Callable[[int], None],
) -> list[Outcome]:
    """As `PrefixTree.run`, but what the journal has of a batch is taken from there, and what it has not recorded.

    `on_batch` is called with the number of images after each batch.

    Raises:
        JournalError: If the journal was begun with other images, or in other batches.
        CalibrationError: If there are no images.
    """
    keys = [candidate.key for candidate in candidates]

    @lru_cache(maxsize=1)
    def tree_of(places: tuple[int, ...]) -> PrefixTree:
        return PrefixTree([candidates[place] for place in places], parts)

    def run(batch: Tensor, places: Sequence[int]) -> list[Answer]:
        tree = tree_of(tuple(places))
        return [Answer(outcome.seconds, {"features": outcome.features}) for outcome in tree.run([batch])]

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
