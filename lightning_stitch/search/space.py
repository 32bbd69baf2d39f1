"""The search space: which fragment may follow which, how well they match, what that costs.

A state is a running network: the fragments so far, and its activation on the calibration images. Strategies decide
which states to follow; the space scores, fits, enters and completes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy
import torch
from torch import Tensor

from lightning_stitch.cost import Budget, Cost
from lightning_stitch.io import Answer, Answers, Carried, Deferred, Spool, carry
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.search.costs import CompositionCosts, Jumps, PlacedStitch
from lightning_stitch.search.scoring import Scorer
from lightning_stitch.search.stopping import NO_LIMIT, TimeLimit
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import (
    Array,
    Calibrated,
    Candidate,
    Grid,
    Kind,
    Segmented,
    Step,
    Stitch,
    chunks,
    fit_stitch,
)


class SearchSpace:
    """All that a strategy may choose from.

    Args:
        sources: Sources with their calibration statistics, all of the same images.
        settings: How rows are sampled and scored; the same as the sources were calibrated with.
        costs: What compositions of these sources cost.
        budget: Limits that every candidate keeps.
        ridge: Strength of the stitches' fit, relative to the mean variance of the sender's channels.
        journal: What remembers CKAs and fitted stitches, and is asked for them first.
        time_limit: When it is over, `walk`, `edges`, `edge` and `enter` raise TimeIsOver.
    """

    def __init__(
        self,
        sources: Sequence[Calibrated],
        settings: CalibrationSettings,
        *,
        costs: CompositionCosts,
        budget: Budget | None = None,
        ridge: float = 1e-3,
        journal: Answers | None = None,
        time_limit: TimeLimit = NO_LIMIT,
    ) -> None:
        self.sources = list(sources)
        self.settings = settings
        self.budget = budget or Budget()
        self.costs = costs
        self.ridge = ridge
        self.journal = journal or Answers()
        self.time_limit = time_limit
        self.rejected: Counter[str] = Counter()
        self._receivers = costs.receivers
        self._places = tuple(numpy.array(costs.receivers, dtype=numpy.int64).reshape(-1, 2).T)
        ends = [r + 2 == len(self.sources[s].parts.pieces) for s, r in costs.receivers]
        self._at_ends = numpy.array(ends, dtype=bool)
        varying = [self.sources[s].statistics[r].centred is not None for s, r in costs.receivers]
        self._varying = numpy.array(varying, dtype=bool)
        self._scorer = Scorer(self.sources, costs.receivers, settings)

    @property
    def cheapest_source(self) -> Cost:
        """Cost of the source with the fewest MACs."""
        return min((source.parts.cost for source in self.sources), key=lambda cost: cost.macs)

    # -- moving ------------------------------------------------------------------------------------------------------

    def starts(self) -> list[State]:
        """One state for each source, at the image."""
        return [State((), index, 0, None, None, None, 1.0, Cost(0, 0)) for index in range(len(self.sources))]

    def walk(self, state: State) -> Iterator[tuple[int, Carried]]:
        """Run a state on through its source, cut by cut; gives each cut's index and activation.

        From the image nothing is run: the calibration pass kept these activations. Elsewhere a piece runs when what it
        gives is first looked at, so that none runs for what a journal answers.
        """
        source = self.sources[state.source]
        if state.activation is None:
            yield from enumerate(source.activations)
            return
        spool, x = Spool(self.settings.keep_activations), state.activation

        def piece(index: int, before: Carried) -> Carried:
            self.time_limit.check()
            return carry(self._run(source.parts, index, before, state.stitch if index == state.entry else None), spool)

        for index in range(state.entry, len(source.parts.cuts)):
            self.time_limit.check()
            x = Carried(Deferred(x, partial(piece, index)))
            yield index, x

    def edges(self, state: State, cut: int, activation: Carried, filters: Filters | None = None) -> list[Edge]:
        """All admissible stitches from a state that has run to a cut; what is not admissible is counted by reason.

        `activation` is what is live at that cut, for all calibration images.
        """
        filters = filters or Filters()
        admissible = self._admissible(state, cut, filters)
        edges = []
        for receiver, cka in self._score(state, cut, activation, admissible):
            if cka < filters.min_cka:
                self.rejected["CKA below the edge threshold"] += 1
            elif state.product * cka < filters.min_product:
                self.rejected["product of CKAs below the threshold"] += 1
            else:
                edges.append(self._edge(state, cut, receiver, cka))
        return edges

    def edge(self, state: State, cut: int, activation: Carried, source: int, receiver: int) -> Edge | None:
        """The stitch to one receiver, however it scores; None where one of the two does not vary (or is not finite)."""
        grid = self.sources[source].parts.cuts[receiver].grid
        if self.sources[source].statistics[receiver].centred is None:
            self.rejected["activation of the receiver does not vary"] += 1
            return None
        scored = self._score(state, cut, activation, {grid: [self.costs.index[source, receiver]]})
        return self._edge(state, cut, *scored[0]) if scored else None

    def enter(self, edge: Edge, activation: Carried) -> State:
        """Fit the stitch of an edge on the calibration rows."""
        self.time_limit.check()
        receiver = self.sources[edge.source]
        placed = self._stitch(edge.state, edge.cut, edge.source, edge.receiver)
        spec = dataclasses.replace(placed.spec, cka=edge.cka)

        @torch.inference_mode()
        def fit() -> Answer:
            sender = self.sources[edge.state.source].parts.cuts[edge.cut]
            entry = edge.receiver + 1
            stitch = fit_stitch(spec, activation, sender, receiver, self.settings, entry=entry, ridge=self.ridge)
            assert stitch is not None  # or it would have no edges
            return Answer(
                {name: getattr(stitch.spec, name) for name in ("r2", "rank", "condition")}, stitch.state_dict()
            )

        number = self.costs.index[edge.source, edge.receiver]
        question = self._question("stitch", edge.state, edge.cut, [number])
        answer = self.journal.recall(question, fit, dict[str, float | None])
        with torch.inference_mode(), self.journal.reading():
            stitch = Stitch(dataclasses.replace(spec, placement="explicit", **answer.value))
            stitch.load_state_dict(dict(answer.tensors))
            stitch.to(receiver.features.device)
        return State(
            steps=edge.state.steps_to(edge.cut + 1),
            source=edge.source,
            entry=edge.receiver + 1,
            stitch=stitch,
            spec=dataclasses.replace(stitch.spec, placement=spec.placement),
            activation=activation,
            product=edge.product,
            cost=edge.cost,
        )

    # -- completing --------------------------------------------------------------------------------------------------

    def complete(self, state: State, *, kind: Kind | None = None) -> Candidate:
        """The network that runs a state's source to its end; of stitched ones the kind follows from their sources."""
        return self._candidate(state, len(self.sources[state.source].parts.pieces), kind)

    def exit(self, state: State, cut: int) -> Candidate:
        """The network that ends early, at a cut of a state's source."""
        return self._candidate(state, cut + 1, "early exit")

    # -- inner workings ----------------------------------------------------------------------------------------------

    def _candidate(self, state: State, last: int, kind: Kind | None) -> Candidate:
        way = state.steps_to(last)
        cost = state.cost + self.costs.run(state.source, state.entry, last)
        kind = kind or ("stitched" if len({step.source for step in way}) > 1 else "shortened")
        parts = [source.parts for source in self.sources]
        return Candidate.of(kind, [way], parts, cost, {"cka_product": state.product})

    def _admissible(self, state: State, cut: int, filters: Filters) -> dict[Grid, list[int]]:
        """The receivers that a state may be stitched to at a cut, by grid; others are counted by the first reason."""
        if not self._receivers:
            return {}
        (sources, cuts), sender = self._places, self.sources[state.source].parts.cuts[cut]
        jumps = self._jumps(state, cut)
        used = state.used | {(state.source, piece) for piece in range(state.entry, cut + 1)}
        still = jumps.possible.copy()

        def leave_out(which: Array, reason: str) -> None:
            if count := int((still & which).sum()):
                self.rejected[reason] += count
            still[which] = False

        if filters.only_ends:
            leave_out(~self._at_ends, "not an end fragment at the last depth")
        leave_out(~self._varying, "activation of the receiver does not vary")
        taken = numpy.zeros_like(still)
        if filters.single_pieces:
            taken[[self.costs.index[s, piece - 1] for s, piece in used if piece]] = True
        else:
            still[self.costs.index[state.source, cut]] = False  # the source itself, and no candidate
            for s, piece in used:
                taken |= (sources == s) & (cuts < piece)
        leave_out(taken, "fragment used already")
        assert self.costs.entering is not None
        if sender.grid is not None:
            most = filters.max_upsampling * math.prod(sender.grid)
            leave_out(numpy.asarray(self.costs.entering.positions > most), "receiver's grid too fine for the sender's")
        budget = self.budget.of_static
        start = state.cost + self.costs.run(state.source, state.entry, cut + 1)
        for measure, least in self.costs.least_over(budget.limits, start, jumps).items():
            leave_out(least > budget.most(measure), "over the budget")
        admissible: dict[Grid, list[int]] = {}
        for flat in numpy.flatnonzero(still).tolist():
            s, r = self._receivers[flat]
            admissible.setdefault(self.sources[s].parts.cuts[r].grid, []).append(flat)
        return admissible

    @torch.inference_mode()
    def _run(self, parts: Segmented, piece: int, x: Carried, stitch: Stitch | None) -> Iterator[Tensor]:
        """Run a piece, behind its stitch where it has one, on what is live before it."""
        for portion in x:
            entered = portion if stitch is None else stitch(portion)
            yield from (parts.fused[piece](chunk) for chunk in chunks(entered, parts.images_at_once))

    def _question(self, kind: str, state: State, cut: int, receivers: Iterable[int]) -> list[object]:
        """What a journal is asked: of which running network, at which cut, about which receivers."""
        path = [(step.source, step.first, step.last) for step in state.steps]
        ends = [self._receivers[number] for number in receivers]
        return [kind, path, (state.source, state.entry, cut), ends]

    def _score(
        self, state: State, cut: int, activation: Carried, admissible: dict[Grid, list[int]]
    ) -> list[tuple[tuple[int, int], float]]:
        """Those receivers, as (source, cut), that can be scored, with their CKA."""
        self.time_limit.check()
        if not admissible:
            return []

        def score() -> Answer:
            rejected: Counter[str] = Counter()
            sender = self.sources[state.source].parts.cuts[cut]
            source = self.sources[state.source].name
            scored = self._scorer.scores(activation, sender, admissible, source=source, rejected=rejected)
            return Answer([scored, rejected])

        question = self._question("ckas", state, cut, chain.from_iterable(admissible.values()))
        scored, rejected = self.journal.recall(
            question, score, tuple[tuple[tuple[int, float], ...], dict[str, int]]
        ).value
        self.rejected.update(rejected)
        asked = {flat: self._receivers[flat] for flat in chain.from_iterable(admissible.values())}
        with self.journal.reading():
            return [(asked[flat], cka) for flat, cka in scored]

    def _edge(self, state: State, cut: int, receiver: tuple[int, int], cka: float) -> Edge:
        """The stitch to a receiver, with what it costs."""
        s, r = receiver
        cost = self._cost_to(state, cut, s, r)
        total = cost + self.costs.run(s, r + 1, len(self.sources[s].parts.pieces))
        return Edge(state, cut, s, r, cka, state.product * cka, cost, total)

    def _jumps(self, state: State, cut: int) -> Jumps:
        return self.costs.jumps(state.source, cut, before_taken=self._is_taken(state, cut))

    def _is_taken(self, state: State, cut: int) -> bool:
        """Whether the layer at a cut took the stitch before in at its entry, and so takes no other at its end."""
        return state.spec is not None and state.spec.placement == "consumer" and cut == state.entry

    def _cost_to(self, state: State, cut: int, s: int, r: int) -> Cost:
        """Cost of a running network up to a receiver, the stitch to it included."""
        run = self.costs.run(state.source, state.entry, cut + 1)
        return state.cost + run + self._stitch(state, cut, s, r).cost

    def _stitch(self, state: State, cut: int, s: int, r: int) -> PlacedStitch:
        """The cheapest exact placement of a stitch, and what it adds."""
        return self.costs.stitch(state.source, cut, s, r, before_taken=self._is_taken(state, cut))


@dataclass(frozen=True, slots=True)
class Filters:
    """What a strategy admits.

    Attributes:
        single_pieces: Fragments are single pieces: only the receiving piece itself must be unused. Otherwise the
            receiver runs on, so all behind it must be.
        only_ends: Admit only pieces that end a network.
        max_upsampling: Most by which a stitch may multiply the number of positions.
        min_cka: Least CKA of a stitch.
        min_product: Least product of CKAs.
    """

    single_pieces: bool = False
    only_ends: bool = False
    max_upsampling: float = math.inf
    min_cka: float = 0.0
    min_product: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """A running network, at the entry of a piece.

    Attributes:
        steps: The fragments that are complete.
        source: Index of the source it runs in.
        entry: Index of the piece that runs next.
        stitch: The stitch before that piece; None: it begins at the image.
        spec: That stitch's structure in the assembled network.
        activation: What the stitch takes, for all calibration images; None: it begins at the image.
        product: Product of the CKAs so far.
        cost: Cost of the steps and the stitch.
    """

    steps: tuple[Step, ...]
    source: int
    entry: int
    stitch: Stitch | None
    spec: StitchSpec | None
    activation: Carried | None
    product: float
    cost: Cost

    @property
    def used(self) -> frozenset[tuple[int, int]]:
        """The (source, piece) pairs of the complete steps."""
        return frozenset((step.source, piece) for step in self.steps for piece in range(step.first, step.last))

    def steps_to(self, last: int) -> tuple[Step, ...]:
        """All steps, once its source has run up to a piece."""
        return (*self.steps, Step(self.source, self.entry, last, self.stitch, self.spec))


@dataclass(frozen=True, slots=True)
class Edge:
    """A possible stitch: from a state that has run to one of its cuts, to a receiver.

    Attributes:
        state: The running network.
        cut: Index of the cut it has run to.
        source: Index of the receiving source.
        receiver: Index of the receiving cut.
        cka: Linear CKA of the two.
        product: Product of the CKAs, this one included.
        cost: Cost up to the receiver's piece, the stitch included.
        total: Cost if the receiver then runs to its end.
    """

    state: State
    cut: int
    source: int
    receiver: int
    cka: float
    product: float
    cost: Cost
    total: Cost
