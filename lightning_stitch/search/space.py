"""The search space: which fragment may follow which, how well they match, what that costs.

A state is a running network: the fragments so far, and its activation on the calibration images. Strategies
(search.py) decide which states to follow; the space scores, fits, enters and completes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor

from lightning_stitch.cost import Budget, Cost
from lightning_stitch.io import Answer, Answers, Carried, Deferred, Spool, carry
from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec
from lightning_stitch.search.costs import CompositionCosts, PlacedStitch
from lightning_stitch.search.scoring import Scorer
from lightning_stitch.search.stopping import NO_LIMIT, TimeLimit
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import (
    Calibrated,
    Candidate,
    GlobalAverage,
    Grid,
    Kind,
    Segmented,
    Step,
    Stitch,
    chunks,
    fit_stitch,
    is_bridgeable,
)


class SearchSpace:
    """All that a strategy may choose from.

    Args:
        sources: Sources with their calibration statistics, all of the same images.
        settings: How rows are sampled and scored; the same as the sources were calibrated with.
        costs: What compositions of these sources cost.
        budget: Limits that every candidate keeps.
        ridge: Strength of the stitches' fit, relative to the mean variance of the sender's channels.
        shortlist: Most receivers of one grid and size class that are scored exactly at one step. Where there are more,
            those nearest by CKA on few rows are (`lightning_stitch.search.scoring`).
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
        shortlist: int = 128,
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
        self._scorer = Scorer(self.sources, costs.receivers, settings, shortlist=shortlist)

    @property
    def num_images(self) -> int:
        """Number of calibration images."""
        return len(self.sources[0].features)

    @property
    def cheapest_source(self) -> Cost:
        """Cost of the source with the fewest MACs."""
        return min((source.parts.cost for source in self.sources), key=lambda cost: cost.macs)

    # -- moving ------------------------------------------------------------------------------------------------------

    def starts(self) -> list[State]:
        """One state for each source, at the image."""
        return [State((), index, 0, None, None, None, None, 1.0, Cost(0, 0)) for index in range(len(self.sources))]

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

    def edges(
        self,
        state: State,
        cut: int,
        activation: Carried,
        *,
        single_pieces: bool = False,
        only_ends: bool = False,
        max_upsampling: float = math.inf,
        min_cka: float = 0.0,
        min_product: float = 0.0,
        size_class: Callable[[int], int] | None = None,
    ) -> list[Edge]:
        """All admissible stitches from a state that has run to a cut; what is not admissible is counted by reason.

        Args:
            state: The running network.
            cut: Index of the cut.
            activation: What is live at that cut, for all calibration images.
            single_pieces: Fragments are single pieces: only the receiving piece itself must be unused. Otherwise the
                receiver runs on, so all behind it must be.
            only_ends: Admit only pieces that end a network.
            max_upsampling: Most by which a stitch may multiply the number of positions.
            min_cka: Least CKA of a stitch.
            min_product: Least product of CKAs.
            size_class: Gives the class of a network's MACs; each has a shortlist of its own. None: all are in one.
        """
        used = state.used | {(state.source, piece) for piece in range(state.entry, cut + 1)}
        admissible: dict[Grid, list[int]] = {}
        for flat, (s, r) in enumerate(self._receivers):
            reason = self._objection(state, cut, s, r, used, single_pieces, only_ends, max_upsampling)
            if reason is None:
                admissible.setdefault(self.sources[s].parts.cuts[r].grid, []).append(flat)
            elif reason:
                self.rejected[reason] += 1
        edges = []
        for flat, cka in self._similarities(state, cut, activation, admissible, size_class):
            s, r = self._receivers[flat]
            product = state.product * cka
            if cka < min_cka:
                self.rejected["CKA below the edge threshold"] += 1
            elif product < min_product:
                self.rejected["product of CKAs below the threshold"] += 1
            else:
                edges.append(self._edge(state, cut, s, r, cka))
        return edges

    def edge(self, state: State, cut: int, activation: Carried, source: int, receiver: int) -> Edge | None:
        """The stitch to one receiver, however it scores; None where one of the two does not vary (or is not finite)."""
        grid = self.sources[source].parts.cuts[receiver].grid
        if self.sources[source].statistics[receiver].centred is None:
            self.rejected["activation of the receiver does not vary"] += 1
            return None
        found = self._similarities(state, cut, activation, {grid: [self.costs.index[source, receiver]]})
        return next((self._edge(state, cut, source, receiver, cka) for _, cka in found), None)

    def enter(self, edge: Edge, activation: Carried) -> State:
        """Fit the stitch of an edge on the calibration rows."""
        self.time_limit.check()
        sender = self.sources[edge.state.source].parts.cuts[edge.cut]
        receiver = self.sources[edge.source].statistics[edge.receiver]
        placed = self._stitch(edge.state, edge.cut, edge.source, edge.receiver)
        spec = dataclasses.replace(placed.spec, cka=edge.cka)

        @torch.inference_mode()
        def fit() -> Answer:
            stitch = fit_stitch(
                spec,
                activation,
                sender,
                receiver,
                self.settings,
                num_images=self.num_images,
                num_held_out=self.sources[edge.source].num_held_out,
                ridge=self.ridge,
            )
            assert stitch is not None  # or it would have no edges
            return Answer(
                {name: getattr(stitch.spec, name) for name in ("r2", "rank", "condition")}, stitch.state_dict()
            )

        number = self.costs.index[edge.source, edge.receiver]
        answer = self.journal.recall(self._question("stitch", edge.state, edge.cut, [number]), fit)
        with torch.inference_mode():
            stitch = Stitch(dataclasses.replace(spec, placement="explicit", **answer.value))
            stitch.load_state_dict(dict(answer.tensors))
            stitch.to(receiver.rows.device)
        step = Step(edge.state.source, edge.state.entry, edge.cut + 1, edge.state.stitch, edge.state.spec)
        return State(
            steps=(*edge.state.steps, step),
            source=edge.source,
            entry=edge.receiver + 1,
            stitch=stitch,
            spec=dataclasses.replace(stitch.spec, placement=spec.placement),
            entry_bytes=placed.entry,
            activation=activation,
            product=edge.product,
            cost=edge.cost,
        )

    # -- completing --------------------------------------------------------------------------------------------------

    def complete(self, state: State, *, kind: Kind = "stitched") -> Candidate:
        """The network that runs a state's source to its end."""
        last = len(self.sources[state.source].parts.pieces)
        steps = (*state.steps, Step(state.source, state.entry, last, state.stitch, state.spec))
        cost = state.cost + self.costs.run(state.source, state.entry, last, entry=state.entry_bytes)
        return Candidate(self._recipe(steps, state.product, cost), kind, steps, cost)

    def exit(self, state: State, cut: int) -> Candidate:
        """The network that ends early, at a cut of a state's source, averaged over that cut's positions."""
        step = Step(state.source, state.entry, cut + 1, state.stitch, state.spec)
        cost = state.cost + self.costs.exit(state.source, state.entry, cut, entry=state.entry_bytes)
        recipe = dataclasses.replace(self._recipe((*state.steps, step), state.product, cost), pooled=True)
        pool = GlobalAverage.of(self.sources[state.source].parts.cuts[cut])
        return Candidate(recipe, "early exit", (*state.steps, step), cost, pool)

    # -- inner workings ----------------------------------------------------------------------------------------------

    def _objection(
        self,
        state: State,
        cut: int,
        s: int,
        r: int,
        used: frozenset[tuple[int, int]],
        single_pieces: bool,
        only_ends: bool,
        max_upsampling: float,
    ) -> str | None:
        """Why a receiver is out of the question; None if it is not, "" if it is no candidate in the first place."""
        parts = self.sources[s].parts
        sender, receiver = self.sources[state.source].parts.cuts[cut], parts.cuts[r]
        if not is_bridgeable(sender, receiver):
            return ""
        if only_ends and r + 1 != len(parts.pieces) - 1:
            return "not an end fragment at the last depth"
        if self.sources[s].statistics[r].centred is None:
            return "activation of the receiver does not vary"
        if not single_pieces and (s, r) == (state.source, cut):
            return ""
        if any(source == s and (piece == r + 1 if single_pieces else piece > r) for source, piece in used):
            return "fragment used already"
        if sender.grid and receiver.grid and math.prod(receiver.grid) > max_upsampling * math.prod(sender.grid):
            return "receiver's grid too fine for the sender's"
        # Without limits there is no need to know what every way on costs.
        if self.budget.limits:
            cost, _ = self._cost_to(state, cut, s, r)
            if not self.budget.allows(cost + self._ahead[self.costs.index[s, r]]):
                return "over the budget"
        return None

    def _edge(self, state: State, cut: int, s: int, r: int, cka: float) -> Edge:
        cost, placed = self._cost_to(state, cut, s, r)
        total = cost + self.costs.run(s, r + 1, len(self.sources[s].parts.pieces), entry=placed.entry)
        return Edge(state, cut, s, r, cka, state.product * cka, cost, total)

    @torch.inference_mode()
    def _run(self, parts: Segmented, piece: int, x: Carried, stitch: Stitch | None) -> Iterator[Tensor]:
        """Run a piece, behind its stitch where it has one, on what is live before it."""
        for portion in x:
            entered = portion if stitch is None else stitch(portion)
            yield from (parts.pieces[piece](chunk) for chunk in chunks(entered, parts.images_at_once))

    def _question(self, kind: str, state: State, cut: int, receivers: Iterable[int]) -> list[object]:
        """What a journal is asked: of which running network, at which cut, about which receivers."""
        path = [(step.source, step.first, step.last) for step in state.steps]
        ends = [self._receivers[number] for number in receivers]
        return [kind, path, (state.source, state.entry, cut), ends]

    def _similarities(
        self,
        state: State,
        cut: int,
        activation: Carried,
        admissible: dict[Grid, list[int]],
        size_class: Callable[[int], int] | None = None,
    ) -> list[tuple[int, float]]:
        """The receivers that can be scored and their CKAs."""
        self.time_limit.check()
        if not admissible:
            return []

        def score() -> Answer:
            rejected: Counter[str] = Counter()
            return Answer([self._scored(state, cut, activation, admissible, size_class, rejected), rejected])

        question = self._question("ckas", state, cut, chain.from_iterable(admissible.values()))
        scored, rejected = self.journal.recall(question, score).value
        self.rejected.update(rejected)
        return [(flat, cka) for flat, cka in scored]

    def _scored(
        self,
        state: State,
        cut: int,
        activation: Carried,
        admissible: dict[Grid, list[int]],
        size_class: Callable[[int], int] | None,
        rejected: Counter[str],
    ) -> list[tuple[int, float]]:
        sender = self.sources[state.source]
        spent = state.cost.macs + self.costs.run(state.source, state.entry, cut + 1).macs

        def class_of(flat: int) -> int:
            assert size_class is not None
            s, r = self._receivers[flat]
            return size_class(spent + self.costs.run(s, r + 1, len(self.sources[s].parts.pieces)).macs)

        return self._scorer.scores(
            activation,
            sender.parts.cuts[cut],
            admissible,
            name=f"the running network at cut {sender.parts.cuts[cut].name!r} of source {sender.name!r}",
            size_class=None if size_class is None else class_of,
            rejected=rejected,
        )

    @cached_property
    def _ahead(self) -> list[Cost]:
        return self.costs.completions(self.budget.limits)

    def _cost_to(self, state: State, cut: int, s: int, r: int) -> tuple[Cost, PlacedStitch]:
        """Cost of a running network up to a receiver, the stitch to it included, and that stitch."""
        placed = self._stitch(state, cut, s, r)
        run = self.costs.run(state.source, state.entry, cut + 1, entry=state.entry_bytes, exit=placed.exit)
        return state.cost + run + placed.cost, placed

    def _stitch(self, state: State, cut: int, s: int, r: int) -> PlacedStitch:
        """The cheapest exact placement of a stitch, and what it adds."""
        # A layer that took the stitch before in at its entry does not take another at its end.
        taken = state.spec is not None and state.spec.placement == "consumer" and cut == state.entry
        find = self.costs.stitch_after_fold if taken else self.costs.stitch
        return find(state.source, cut, s, r)

    def _recipe(self, steps: tuple[Step, ...], product: float, cost: Cost) -> Recipe:
        refs, fragments, stitches = {}, [], []
        for step in steps:
            parts = self.sources[step.source].parts
            refs[parts.name] = parts.source.ref
            names = [None, *(cut.name for cut in parts.cuts), parts.end]
            fragments.append(FragmentRef(parts.name, names[step.first], names[step.last]))
            stitches.append(step.spec)
        return Recipe(
            sources=tuple(refs.values()),
            fragments=tuple(fragments),
            stitches=tuple(stitches[1:]),
            input_size=self.sources[steps[0].source].parts.image_shape,
            scores={
                "cka_product": product,
                "params": cost.params,
                "macs": cost.macs,
                "activation_bytes": cost.activation_bytes,
            },
        )


@dataclass(frozen=True, slots=True)
class State:
    """A running network, at the entry of a piece.

    Attributes:
        steps: The fragments that are complete.
        source: Index of the source it runs in.
        entry: Index of the piece that runs next.
        stitch: The stitch before that piece; None: it begins at the image.
        spec: That stitch's structure in the assembled network.
        entry_bytes: What that stitch gives for one image.
        activation: What the stitch takes, for all calibration images; None: it begins at the image.
        product: Product of the CKAs so far.
        cost: Cost of the steps and the stitch.
    """

    steps: tuple[Step, ...]
    source: int
    entry: int
    stitch: Stitch | None
    spec: StitchSpec | None
    entry_bytes: int | None
    activation: Carried | None
    product: float
    cost: Cost

    @property
    def used(self) -> frozenset[tuple[int, int]]:
        """The (source, piece) pairs of the complete steps."""
        return frozenset((step.source, piece) for step in self.steps for piece in range(step.first, step.last))


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
