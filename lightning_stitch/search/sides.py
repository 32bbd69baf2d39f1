"""Compositions side by side, with one joint head: greedy forward selection by leave-one-out gain.

Nothing runs for it. The Gram matrix of a joint readout is that of what was chosen so far plus those of the taps that
are new, so that adding a source, an exit, a smaller image or a stitched tail is judged in one decomposition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from lightning_stitch.cost import Budget, Cost
from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import (
    Judgement,
    SelectionData,
    common_length,
    gram_of_taps,
    label_scores,
    soft_scores,
)
from lightning_stitch.search.results import Ranked, pick, rank_one
from lightning_stitch.stitching import Candidate, Segmented, Way, piece_keys, pieces_of, stitch_cost

_MOST_OF_A_KIND = 4  # additions that are tried of one source, from its cheapest to its best


def side_by_side(
    ranked: Sequence[Ranked],
    selection: SelectionData,
    outcomes: Mapping[str, Outcome],
    parts: Sequence[Segmented],
    budget: Budget,
    *,
    max_roots: int,
) -> list[Ranked]:
    """The best candidate that keeps a budget, with one more beside it, and one more, as long as each is worth it.

    An addition is worth it where it lowers the squared error of the images left out by more than one standard error of
    that over the images. Of those that cannot be told from the best one, by one standard error, the cheapest is taken.

    Args:
        ranked: Candidates, best first.
        selection: What they were ranked by, with labels.
        outcomes: What they gave, by their keys.
        parts: The sources that their steps refer to.
        budget: Limits that all keep.
        max_roots: Most candidates side by side.
    """
    allowed = [r for r in ranked if r.candidate.kind != "self-stitched" and budget.allows(r.candidate.cost)]
    if not allowed or allowed[0].errors is None:
        return []
    best = pick(allowed, dataclasses.replace(budget, min_score=None))
    score = soft_scores if "loo_soft_r2" in best.scores else label_scores
    outcome, chosen = outcomes[best.candidate.key], list[Ranked]()
    for _ in range(max_roots - 1):
        joined: list[tuple[Candidate, Outcome]] = []
        for addition in _additions(allowed, best.candidate):
            candidate = join(best.candidate, addition.candidate, parts)
            if candidate is not None and budget.allows(candidate.cost):
                joined.append((candidate, join_outcomes(outcome, outcomes[addition.candidate.key], candidate)))
        joints = [joint for _, joint in joined]
        if not joints:
            break
        base = gram_of_taps(joints[0], outcome.keys)
        judge = partial(_judge_joints, base=base, known=outcome.keys, score=partial(score, selection=selection))
        judgements = selection.ranks.share(joints, judge)
        trials = [
            (rank_one(candidate, judged.scores, joint, judged.errors, judged.losses), joint)
            for (candidate, joint), judged in zip(joined, judgements, strict=True)
        ]
        worth = [(r, joint) for r, joint in trials if r.gain_over(best)[0] > r.gain_over(best)[1]]
        if not worth:
            break
        first = max((r for r, _ in worth), key=lambda r: r.gain_over(best)[0])
        alike = [(r, joint) for r, joint in worth if first.gain_over(r)[0] <= first.gain_over(r)[1]]
        best, outcome = min(alike, key=lambda pair: pair[0].candidate.cost.macs)
        chosen.append(best)
    return chosen


def _judge_joints(
    joints: Sequence[Outcome], *, base: Tensor, known: Sequence[str], score: Callable[[Tensor], Judgement]
) -> list[Judgement]:
    """What is said of readouts that have more taps than those that are known, whose Gram matrix is `base`."""
    return [score(base + gram_of_taps(joint, {*joint.keys} - {*known})) for joint in joints]


def _additions(ranked: Sequence[Ranked], chosen: Candidate) -> list[Ranked]:
    """What may stand beside a composition: of each source and kind of image some that nothing cheaper beats."""
    fronts: dict[tuple[object, ...], list[Ranked]] = {}
    begun = {(way[0].source, len(way) > 1) for way in chosen.ways}
    for r in sorted(ranked, key=lambda r: (r.candidate.cost.macs, -r.score)):
        steps = r.candidate.steps
        if len(steps) == 1 and any(steps[0].source == source for source, _ in begun):
            continue  # a longer or shorter part of what is there
        front = fronts.setdefault(tuple(step.source for step in steps), [])
        if not front or r.score > front[-1].score:
            front.append(r)
    additions: list[Ranked] = []
    for front in fronts.values():
        places = torch.linspace(0, len(front) - 1, min(len(front), _MOST_OF_A_KIND)).round().int().tolist()
        additions += [front[place] for place in places]
    return additions


def join(first: Candidate, second: Candidate, parts: Sequence[Segmented]) -> Candidate | None:
    """Two candidates as one, their common front once, the first one's taps first; None where the second adds none."""
    known = set(keys_of_reads(first))
    if set(keys_of_reads(second)) <= known:
        return None
    ways, places = list(first.ways), []
    for way in second.ways:
        path = piece_keys(way)
        paths = [piece_keys(other) for other in ways]
        lengths = [common_length(path, other) for other in paths]
        within = [n for n, length in enumerate(lengths) if length in (len(path), len(paths[n]))]
        if not within:
            ways.append(way)
        elif len(path) > len(paths[within[0]]):
            ways[within[0]] = way  # which goes on where the other ends
        places.append(within[0] if within else len(ways) - 1)
    more = zip(keys_of_reads(second), second.reads, strict=True)
    reads = [*first.reads, *(read._replace(way=places[read.way]) for key, read in more if key not in known)]
    product = math.prod(spec.cka or 1.0 for way in ways for step in way if (spec := step.spec) is not None)
    cost = first.cost + second.cost + _shared_cost(first.ways, second.ways, parts)
    return Candidate.of("side by side", ways, parts, cost, {"cka_product": product}, reads=reads)


def _shared_cost(first: Sequence[Way], second: Sequence[Way], parts: Sequence[Segmented]) -> Cost:
    """What is counted twice of the fronts that ways have in common, below 0."""
    shared = Cost(0, 0)
    for way in second:
        lengths = [common_length(piece_keys(way), piece_keys(rival)) for rival in first]
        for step, piece in islice(pieces_of(way), max(lengths)):
            part = parts[step.source]
            shared = shared + part.cost_between(piece, piece + 1)
            if piece == step.first and step.spec is not None:
                before = way[way.index(step) - 1]
                pieces = parts[before.source].pieces[before.last - 1], part.pieces[piece]
                shared = shared + Cost(*stitch_cost(step.spec, *pieces, step.spec.placement))
    return Cost(-shared.params, -shared.macs)


def join_outcomes(first: Outcome, second: Outcome, candidate: Candidate) -> Outcome:
    """What two candidates gave together, in the order of the joint one's taps."""
    vectors = dict(zip((*second.keys, *first.keys), (*second.vectors, *first.vectors), strict=True))
    keys = keys_of_reads(candidate)
    seconds = first.seconds + second.seconds
    return Outcome(tuple(vectors[key] for key in keys), keys, candidate.recipe.head_blocks, seconds)
