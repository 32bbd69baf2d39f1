"""How alike sources are, cut by cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_stitch.maths import cka_of_grams
from lightning_stitch.search import Outcome, gram_of_taps
from lightning_stitch.stitching import Candidate
from lightning_stitch.tables import Record

_MOST_IMAGES = 256
_MOST_SOURCES = 4  # whose pairs are shown


def similarities_of(sources: Sequence[Candidate], outcomes: Sequence[Outcome]) -> list[Record]:
    """How alike any two sources are at their cuts: debiased CKA of what heads read there, each feature standardised.

    Args:
        sources: Unmodified sources; of more than four the first.
        outcomes: What each gave of the images, at least four; of more than 256 the first.
    """
    read = []
    for candidate, outcome in list(zip(sources, outcomes, strict=True))[:_MOST_SOURCES]:
        if outcome.blocks is None or len(outcome.vectors[0]) < 4:
            continue
        vectors = tuple(x[:_MOST_IMAGES] for x in outcome.vectors)
        outcome = dataclasses.replace(outcome, vectors=vectors)
        ends = [candidate.recipe.fragments[tap.fragment].end or "output" for tap in candidate.recipe.taps]
        grams = [gram_of_taps(outcome, {key}) for key in outcome.keys]
        varied = [n for n, gram in enumerate(grams) if bool(gram.abs().max() > 0)]
        name = candidate.recipe.fragments[0].source
        read.append((name, [ends[n] for n in varied], [grams[n] for n in varied]))
    pairs = [(a, b) for place, a in enumerate(read) for b in read[place + 1 :]]
    return [
        {
            "sources": [first[0], second[0]],
            "cuts": [first[1], second[1]],
            "values": [[round(float(cka_of_grams(x, y)), 3) for y in second[2]] for x in first[2]],
        }
        for first, second in pairs
    ]
