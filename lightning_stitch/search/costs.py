"""What any composition of sources' pieces costs, and the least that one can cost, before anything is run.

Parameters, multiply-accumulates and latency of a composition are sums over its pieces and stitches. Its activation
bytes are not: what is alive at once depends on the folds at both ends of every fragment, so that a composition is
assembled first and then measured (`lightning_stitch.search.results.measure_candidates`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy

from lightning_stitch.cost import Budget, Cost, in_words
from lightning_stitch.errors import BudgetError
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.stitching import PLACES, Array, Entering, Leaving, Segmented, cheapest_places, stitch_spec

_SUMS = ("params", "macs", "latency_ms")


class PlacedStitch(NamedTuple):
    """A stitch between two cuts, placed where it is cheapest, and what it adds to its fragments: by a fold below 0."""

    spec: StitchSpec
    cost: Cost


class Jumps(NamedTuple):
    """The stitches from one cut to every receiver, each where it is cheapest.

    Attributes:
        possible: Whether a stitch can lead there: anywhere but from a vector to a grid.
        places: Where it lies, as a place in `PLACES`.
        params: Parameters that it adds.
        macs: Multiply-accumulates that it adds for an image.
    """

    possible: Array
    places: Array
    params: Array
    macs: Array


class _Table(NamedTuple):
    """The least in one measure, by receivers: of stitches, of runs to a later cut, and of any way on.

    The last is a list: with up to 0, 1, ... more stitches.
    """

    jumps: Array
    runs: Array
    ahead: list[Array]


class CompositionCosts:
    """What every stitch between the cuts of some sources costs, and the least that any way on from a cut costs.

    With `early_exits`, sources that end at one of their cuts are compositions, too. `receivers` are all (source, cut)
    index pairs at which a fragment may begin.
    """

    def __init__(
        self, parts: Sequence[Segmented], *, bias: bool, max_fragments: int, early_exits: bool = False
    ) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.receivers = [(s, r) for s, part in enumerate(self.parts) for r in range(len(part.cuts))]
        self.index = {receiver: flat for flat, receiver in enumerate(self.receivers)}
        at_entries = [
            Entering.of(self.parts[s].pieces[r + 1], cut.channels, cut.grid, cut.num_prefix_tokens, bias=bias)
            for s, r in self.receivers
            for cut in [self.parts[s].cuts[r]]
        ]
        self.entering = Entering.stack(at_entries) if at_entries else None
        self._jumps: dict[tuple[int, int, bool], Jumps] = {}
        self._placed: dict[tuple[int, int, int, int, bool], PlacedStitch] = {}
        self._costs: dict[tuple[int, int, int], Cost] = {}
        self._tables: dict[str, _Table] = {}
        self._latencies: Sequence[Sequence[float]] | None = None
        self._ms_per_mac = 0.0
        self._max_fragments = max_fragments
        self.early_exits = early_exits

    def time(self, latencies: Sequence[Sequence[float]]) -> None:
        """Estimate latencies from now on, by the milliseconds of each piece of each source.

        A composition takes the sum of its pieces' times. A stitch takes for each multiply-accumulate that it adds as
        long as the fastest source on the whole, and none for what it saves.
        """
        self._latencies = latencies
        self._costs.clear()
        self._ms_per_mac = min(
            sum(times) / max(part.cost.macs, 1) for part, times in zip(self.parts, latencies, strict=True)
        )
        self._placed.clear()
        self._tables.pop("latency_ms", None)

    def run(self, source: int, first: int, last: int) -> Cost:
        """Cost of a source's pieces from one index up to, not including, another."""
        key = (source, first, last)
        if key not in self._costs:
            cost = self.parts[source].cost_between(first, last)
            if self._latencies is not None:
                cost = dataclasses.replace(cost, latency_ms=sum(self._latencies[source][first:last]))
            self._costs[key] = cost
        return self._costs[key]

    def stitch(self, sender: int, cut: int, source: int, receiver: int, *, before_taken: bool = False) -> PlacedStitch:
        """The stitch between two cuts where it is cheapest, and what it adds to its fragments.

        With `before_taken` the sender's last layer has taken the stitch before in at its entry, and takes no other.
        """
        key = (sender, cut, source, receiver, before_taken)
        if key not in self._placed:
            jumps, flat = self.jumps(sender, cut, before_taken=before_taken), self.index[source, receiver]
            spec = stitch_spec(
                self.parts[sender].cuts[cut],
                self.parts[source].cuts[receiver],
                bias=self.bias,
                placement=PLACES[jumps.places[flat]],
            )
            params, macs = int(jumps.params[flat]), int(jumps.macs[flat])
            self._placed[key] = PlacedStitch(spec, Cost(params, macs, latency_ms=max(macs, 0) * self._ms_per_mac))
        return self._placed[key]

    def jumps(self, source: int, cut: int, *, before_taken: bool = False) -> Jumps:
        """The stitches from a cut to every receiver, as `stitch` has them one by one."""
        key = (source, cut, before_taken)
        if key not in self._jumps:
            assert self.entering is not None
            sender = self.parts[source].cuts[cut]
            before = self.parts[source].pieces[cut]
            leaving = Leaving.of(before, sender.channels, sender.grid, sender.num_prefix_tokens)
            # Anything can be stitched to anything, but no vector to a grid.
            possible = numpy.asarray((self.entering.positions == 0) | (sender.grid is not None))
            chosen = cheapest_places(leaving, self.entering, bias=self.bias, before_taken=before_taken)
            self._jumps[key] = Jumps(possible, *chosen)
        return self._jumps[key]

    def self_stitched(self, source: int) -> Cost:
        """Cost of a source stitched to itself at each of its cuts; a fold can make it less than the source's."""
        part = self.parts[source]
        total, taken = self.run(source, 0, len(part.pieces)), False
        for cut in range(len(part.cuts)):
            placed = self.stitch(source, cut, source, cut, before_taken=taken)
            total, taken = total + placed.cost, placed.spec.placement == "consumer"
        return total

    def least_over(self, measures: Iterable[str], start: Cost, jumps: Jumps) -> dict[str, Array]:
        """The least of any network that takes one of these stitches, in those of some measures that are sums.

        `start` is the cost up to the stitch.
        """
        return {
            measure: getattr(start, measure) + self._of_jumps(measure, jumps) + self._table(measure).ahead[-1]
            for measure in measures
            if measure in _SUMS
        }

    def cheapest(self, measure: str) -> tuple[float, str]:
        """The least that any network costs in one measure that is a sum, and the network in words."""
        wholes = []
        for s, part in enumerate(self.parts):
            wholes.append((getattr(self.run(s, 0, len(part.pieces)), measure), f"{part.name} as it is"))
            if self._max_fragments > 1:
                wholes.append((getattr(self.self_stitched(s), measure), f"{part.name} stitched to itself at each cut"))
            if self.early_exits:
                exits = ((getattr(self.run(s, 0, c + 1), measure), cut.name) for c, cut in enumerate(part.cuts))
                wholes += [(cost, f"{part.name} ended at {name}") for cost, name in exits]
        best, path = min(wholes, key=lambda whole: whole[0])
        if self._max_fragments == 1:
            return best, f"{path} at {'x'.join(map(str, self.parts[0].image_shape[1:]))}"
        table = self._table(measure)
        # Where several cost the same, the one with the fewest stitches is named.
        for ahead, (flat, (s, c)) in product(table.ahead, enumerate(self.receivers)):
            onward = table.jumps[flat] + ahead
            total = getattr(self.run(s, 0, c + 1), measure) + onward.min().item()
            if total < best:
                start = f"{self.parts[s].name} to {self.parts[s].cuts[c].name}"
                best, path = total, f"{start}, then {self._path(measure, int(onward.argmin()))}"
        return best, path

    def check(self, budget: Budget, *smaller: CompositionCosts) -> None:
        """Refuse (BudgetError) a budget that no composition can keep, naming the cheapest one and its cost.

        `smaller` are the costs of the sources on smaller images.
        """
        for measure, limit in budget.limits.items():
            if measure == "latency_ms" and self._latencies is None:
                continue
            if measure == "activation_bytes":
                # All that is known before a network is assembled: it holds the image.
                least, path = float(4 * math.prod(self.parts[0].image_shape)), "the image alone"
            else:
                least, path = min(costs.cheapest(measure) for costs in (self, *smaller))
            if least > budget.most(measure):
                how = {"activation_bytes": "at least ", "latency_ms": "by estimate "}.get(measure, "")
                raise BudgetError(
                    f"No network keeps the budget of at most {in_words(measure, limit, digits=12)}: the cheapest "
                    f"composition has {how}{in_words(measure, least, digits=12, bare=True)} ({path}). Raise the "
                    f"budget, add a smaller source, use a finer granularity or smaller images."
                )

    # -- inner workings ----------------------------------------------------------------------------------------------

    def _of_jumps(self, measure: str, jumps: Jumps) -> Array:
        """What stitches add in a measure."""
        return numpy.maximum(jumps.macs, 0) * self._ms_per_mac if measure == "latency_ms" else getattr(jumps, measure)

    def _path(self, measure: str, flat: int) -> str:
        """The cheapest way on from a receiver in words."""
        s, r = self.receivers[flat]
        text = f"{self.parts[s].name} from {self.parts[s].cuts[r].name}"
        table = self._table(measure)
        ahead = table.ahead
        rounds = next(index for index, costs in enumerate(ahead) if costs[flat] == ahead[-1][flat])
        if rounds == 0:
            return f"{text} to its end"
        jumps = table.jumps + ahead[rounds - 1]
        cut = int((table.runs[flat] + jumps.min(1)).argmin())
        onward = self._path(measure, int(jumps[cut].argmin()))
        return f"{text} to {self.parts[s].cuts[self.receivers[cut][1]].name}, then {onward}"

    def _table(self, measure: str) -> _Table:
        if measure in self._tables:
            return self._tables[measure]
        count = len(self.receivers)
        to_end, (jumps, runs) = numpy.zeros(count), numpy.full((2, count, count), numpy.inf)
        for i, (s, c) in enumerate(self.receivers):
            part = self.parts[s]
            to_end[i] = getattr(self.run(s, c + 1, len(part.pieces)), measure)
            for later in range(c + 1, len(part.cuts)):
                runs[i, self.index[s, later]] = getattr(self.run(s, c + 1, later + 1), measure)
            onward = self.jumps(s, c)
            jumps[i] = numpy.where(onward.possible, self._of_jumps(measure, onward), numpy.inf)
        ahead = [to_end]
        # One more stitch each time (Bellman).
        for _ in range(self._max_fragments - 2 if count else 0):
            least = (runs + (jumps + ahead[-1]).min(1)).min(1)
            ahead.append(numpy.minimum(ahead[-1], least))
            if numpy.array_equal(ahead[-1], ahead[-2]):
                break
        self._tables[measure] = _Table(jumps, runs, ahead)
        return self._tables[measure]


def costs_of_pairs(parts: Sequence[Segmented], *, early_exits: bool) -> CompositionCosts:
    """The costs of networks of at most two fragments, all of them computed at once, for many searches to come."""
    costs = CompositionCosts(parts, bias=True, max_fragments=2, early_exits=early_exits)
    for measure in ("params", "macs"):
        costs.cheapest(measure)
    return costs
