"""Run many candidates over the same images at once.

Candidates that begin alike share their front: the set of candidates is a prefix tree, each of its nodes runs once for a
batch, and what is read of a node is read once for all candidates that read it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice

import torch
from torch import Tensor

from lightning_stitch.cutting import fuse, with_tensors
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Answer, Answers, key_of, tensors_hash
from lightning_stitch.recipe import Statistic
from lightning_stitch.search.ranks import ALONE, Ranks
from lightning_stitch.stitching import Candidate, Reading, Segmented, Way, chunks, pieces_of

_KEYS_AT_ONCE = 32  # of what ranks exchange


@dataclass(slots=True)
class _Node:
    """One piece or stitch, what is read behind it, and the nodes that follow."""

    run: Callable[[Tensor], Tensor]
    reads: dict[str, Reading] = field(default_factory=dict)
    children: dict[Hashable, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one candidate gave.

    Attributes:
        vectors: What each of its taps gave (images x width), float32, on the CPU; shared with candidates that read the
            same.
        keys: What each of them is of; of several candidates those that read the same have the same key.
        blocks: Widths of all statistics of the taps, in a row, for a head (`Recipe.head_blocks`).
        seconds: Wall time of its own nodes, shared ones included: what it would have cost alone.
    """

    vectors: tuple[Tensor, ...]
    keys: tuple[str, ...]
    blocks: tuple[int, ...] | None
    seconds: float

    @property
    def features(self) -> Tensor:
        """What all taps gave side by side (images x features)."""
        return self.vectors[0] if len(self.vectors) == 1 else torch.cat(self.vectors, dim=1)


class Remembered:
    """What was read of the images that a search chose by, so that heads and comparisons need not run them again."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}  # by the hash of an image
        self._vectors: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}

    def add(
        self, images: Sequence[str], vectors: dict[str, Tensor], seconds: Mapping[str, float], *, more: bool = False
    ) -> None:
        """Take in what was read of images, by key (images x width), out of the dictionary, and its seconds.

        That is in place of what was there, or with `more` behind it; then keys that are not read any more are let go.
        """
        if not more:
            self._rows, self._vectors, self._seconds = {}, {}, {}
        known = len(next(iter(self._vectors.values()))) if self._vectors else 0
        self._rows |= {image: known + row for row, image in enumerate(images)}
        joined = {}
        for key in list(vectors):
            # One by one, so that nothing is held twice.
            x = vectors.pop(key)
            joined[key] = torch.cat([self._vectors.pop(key), x]) if more else x
        self._vectors = joined
        self._seconds = {key: self._seconds.get(key, 0.0) + spent for key, spent in seconds.items()}

    def all_of(self, keys: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What was read of all images, by key, and its seconds; shared, not copied."""
        wanted = list(keys)
        return {key: self._vectors[key] for key in wanted}, {key: self._seconds[key] for key in wanted}

    @property
    def known(self) -> list[str]:
        """The keys of what it remembers."""
        return sorted(self._vectors)

    def keep(self, keys: Iterable[str]) -> None:
        """Let go of all but these."""
        self._vectors = {key: self._vectors[key] for key in keys if key in self._vectors}

    def recall(self, images: Sequence[str], key: str) -> Answer | None:
        """What was read of these images, and the seconds that it took; None where it is not known of all of them."""
        x, rows = self._vectors.get(key), [self._rows.get(image) for image in images]
        if x is None or None in rows:
            return None
        return Answer(self._seconds[key] * len(rows) / len(x), {"vector": x[rows]})


class PrefixTree:
    """What is to be read of ways, as a prefix tree, over the sources that their steps refer to."""

    def __init__(self, parts: Sequence[Segmented]) -> None:
        self._parts = parts
        self._images_at_once = min(part.images_at_once for part in parts)
        self._roots: dict[int, _Node] = {}

    def add(self, key: str, way: Way, num_pieces: int, statistics: tuple[Statistic, ...]) -> None:
        """Let what is read behind the first pieces of a way be known by a key."""
        first = way[0].source
        node = self._roots.setdefault(first, _Node(self._parts[first].preprocess))
        for step, piece in islice(pieces_of(way), num_pieces):
            if step.stitch is not None and piece == step.first:
                key_of_stitch = ("stitch", step.source, step.first, step.key)
                node = node.children.setdefault(key_of_stitch, _Node(step.stitch))
            part, key_of_piece = self._parts[step.source], ("piece", step.source, piece, step.key)
            if key_of_piece not in node.children:
                healed = with_tensors(part.pieces[piece], step.tensors)
                run = part.fused[piece] if healed is part.pieces[piece] else fuse(healed)
                node.children[key_of_piece] = _Node(run)
            node = node.children[key_of_piece]
        node.reads[key] = Reading(part.cuts[piece] if piece < len(part.cuts) else None, statistics)

    def run(self, images: Iterable[Tensor]) -> dict[str, tuple[Tensor, float]]:
        """By key what was read (images x width), and the seconds to there, for batches of images in [0, 1].

        A batch is (batch, channels, height, width).
        """
        vectors: dict[str, list[Tensor]] = {}
        seconds: dict[str, float] = {}

        def descend(node: _Node, x: Tensor, spent: float) -> None:
            begun = time.perf_counter()
            x = node.run(x)
            spent += time.perf_counter() - begun
            for key, reading in node.reads.items():
                vectors.setdefault(key, []).append(reading(x).float().cpu())
                seconds[key] = seconds.get(key, 0.0) + spent
            for child in node.children.values():
                descend(child, x, spent)

        with torch.inference_mode():
            for batch in images:
                for chunk in chunks(batch, self._images_at_once):
                    for root in self._roots.values():
                        descend(root, chunk, 0.0)
        # Joined outside of inference mode, these are ordinary tensors again, on which a head can be fitted and trained.
        return {key: (torch.cat(portions), seconds[key]) for key, portions in vectors.items()}


def keys_of_reads(candidate: Candidate) -> tuple[str, ...]:
    """What each tap of a candidate is of: the same for those that read the same, in any process."""
    keys = []
    for read in candidate.reads:
        front: list[list[object]] = []
        for step, piece in islice(pieces_of(candidate.ways[read.way]), read.num_pieces):
            if piece == step.first:
                front.append([])
            front[-1] = [step.source, step.first, piece + 1, step.key]
        keys.append(key_of(front, read.statistics))
    return tuple(keys)


def outcomes(
    candidates: Sequence[Candidate],
    parts: Sequence[Segmented],
    images: Iterable[Tensor],
    *,
    journal: Answers,
    remembered: Remembered | None = None,
    remember: bool = False,
    first_batch: int = 0,
    ranks: Ranks = ALONE,
    on_batch: Callable[[int], None],
) -> list[Outcome]:
    """What candidates give for batches of images; what is remembered or in the journal of a batch is taken from there.

    What is not is recorded; with `remember` all of it is remembered afterwards, in place of what was, or behind it
    where `first_batch` says that some were before, and what candidates gave of these is given, too. `on_batch` is
    called with the number of images after each batch.
    Ranks that have the same candidates run some of the batches each, and exchange what they read.

    Raises:
        JournalError: If the journal was begun with other images, or in other batches.
        CalibrationError: If there are no images.
    """
    keys_of_candidates = [keys_of_reads(candidate) for candidate in candidates]
    reads: dict[str, tuple[Way, int, tuple[Statistic, ...]]] = {}
    for candidate, of_one in zip(candidates, keys_of_candidates, strict=True):
        for key, (way, num_pieces, statistics) in zip(of_one, candidate.reads, strict=True):
            reads.setdefault(key, (candidate.ways[way], num_pieces, statistics))
    keys = list(reads)
    widths = {
        key: tap.num_features
        for candidate, of_one in zip(candidates, keys_of_candidates, strict=True)
        for key, tap in zip(of_one, candidate.recipe.taps, strict=True)
    }

    @lru_cache(maxsize=1)
    def tree_of(places: tuple[int, ...]) -> PrefixTree:
        tree = PrefixTree(parts)
        for place in places:
            tree.add(keys[place], *reads[keys[place]])
        return tree

    def run(batch: Tensor, unknown: Sequence[int], numbers: Sequence[int]) -> list[Answer]:
        places = tuple(unknown[number] for number in numbers)
        results = tree_of(places).run([batch])
        return [Answer(seconds, {"vector": x}) for x, seconds in (results[keys[place]] for place in places)]

    remembered = remembered or Remembered()
    ranks = ranks if ranks.count > 1 and ranks.agree([keys, remembered.known]) else ALONE
    answers: list[list[Answer | None]] = []
    unknown: list[set[int]] = []
    sizes: list[int] = []
    hashes: list[str] = []
    for number, batch in enumerate(images, start=first_batch):
        content, of_images = tensors_hash([batch]), [tensors_hash([image]) for image in batch]
        journal.agree({f"selection images, batch {number}": [list(batch.shape), content]})
        known = {key: remembered.recall(of_images, key) for key in keys}
        places = [place for place, key in enumerate(keys) if known[key] is None]
        found: Iterator[Answer | None] = iter([None] * len(places))
        if ranks.does(number):
            questions = [["tap", number, content, keys[place]] for place in places]
            answers_of_batch = journal.recall_all(questions, partial(run, batch, places), float)
            with journal.reading():
                for place, answer in zip(places, answers_of_batch, strict=True):
                    if answer.tensors["vector"].shape != (len(batch), widths[keys[place]]):
                        raise ValueError(f"what was read of {len(batch)} images has another shape")
            found = iter(answers_of_batch)
        answers.append([known[key] or next(found) for key in keys])
        unknown.append(set(places))
        sizes.append(len(batch))
        hashes += of_images
        on_batch(len(batch))
    if not answers:
        raise CalibrationError("There are no images to run the candidates on.")
    vectors: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    answers = _exchanged(answers, unknown, sizes, [widths[key] for key in keys], first_batch, ranks)
    for key in reversed(keys):
        # Taken off as they are joined, so that nothing is held twice.
        of_one_tap = [tap for of_batch in answers if (tap := of_batch.pop()) is not None]
        vectors[key] = torch.cat([tap.tensors["vector"] for tap in of_one_tap])
        seconds[key] = sum(tap.value for tap in of_one_tap)
    if remember:
        remembered.add(hashes, vectors, seconds, more=first_batch > 0)
        vectors, seconds = remembered.all_of(keys)
    results = []
    for candidate, of_one in zip(candidates, keys_of_candidates, strict=True):
        last = {read.way: key for read, key in zip(candidate.reads, of_one, strict=True)}
        spent = sum(seconds[key] for key in last.values())
        results.append(Outcome(tuple(vectors[key] for key in of_one), of_one, candidate.recipe.head_blocks, spent))
    return results


def _exchanged(
    answers: Sequence[Sequence[Answer | None]],
    unknown: Sequence[Collection[int]],
    sizes: Sequence[int],
    widths: Sequence[int],
    first_batch: int,
    ranks: Ranks,
) -> list[list[Answer | None]]:
    """The answers of all batches (batches x keys), those among them that other ranks ran.

    `unknown` are the places of the keys that some rank ran for each batch, `sizes` the batches' images.
    """
    complete = [list(of_batch) for of_batch in answers]
    if ranks.count == 1:
        return complete
    if not ranks.agree(list(sizes)):
        raise CalibrationError("Ranks were given different images; all need the same, in the same batches.")
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for place in range(len(widths)):
        groups[tuple(number for number, places in enumerate(unknown) if place in places)].append(place)
    for numbers, places in groups.items():
        if not numbers:
            continue
        of_rank = [[n for n in numbers if (first_batch + n) % ranks.count == rank] for rank in range(ranks.count)]
        own = [[complete[n][place] or Answer() for place in places] for n in of_rank[ranks.index]]
        spent = torch.tensor([[answer.value for answer in row] for row in own], dtype=torch.float64)
        seconds = ranks.gather(spent.view(-1, len(places)), [len(theirs) for theirs in of_rank])
        rows = [sum(sizes[n] for n in theirs) for theirs in of_rank]
        for start in range(0, len(places), _KEYS_AT_ONCE):
            some = places[start : start + _KEYS_AT_ONCE]
            columns = [widths[place] for place in some]
            read = [torch.cat([a.tensors["vector"] for a in row[start : start + len(some)]], dim=1) for row in own]
            parts = ranks.gather(torch.cat([torch.zeros(0, sum(columns)), *read]), rows)
            for theirs, part, spent_there in zip(of_rank, parts, seconds, strict=True):
                for row, (n, x) in enumerate(zip(theirs, part.split([sizes[n] for n in theirs]), strict=True)):
                    for column, (place, vector) in enumerate(zip(some, x.split(columns, dim=1), strict=True)):
                        complete[n][place] = Answer(float(spent_there[row, start + column]), {"vector": vector})
    return complete
