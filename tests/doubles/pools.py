"""Pools and search spaces of small sources, networks composed of them, and what a search returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from doubles.small_sources import donor
from doubles.tensors import digits
from torch import Tensor

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import self_stitched, unmodified
from lightning_stitch.search.results import SearchResult
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source
from lightning_stitch.stitching.activations import calibrate
from lightning_stitch.stitching.candidates import Candidate, Kind
from lightning_stitch.stitching.segments import segment


def space_of(
    sources: Sequence[Source],
    images: Tensor,
    *,
    settings: CalibrationSettings | None = None,
    budget: Budget | None = None,
    bias: bool = True,
    ridge: float = 1e-3,
    max_fragments: int = 16,
) -> SearchSpace:
    """Sources cut, calibrated on one batch and ready to be searched."""
    settings = settings or CalibrationSettings(readout="last")
    parts = [segment(source, settings, tuple(images.shape[1:])) for source in sources]
    costs = CompositionCosts(parts, bias=bias, max_fragments=max_fragments)
    return SearchSpace(
        [calibrate(part, [images], settings) for part in parts], settings, costs=costs, budget=budget, ridge=ridge
    )


@cache
def calibrated_pool(*architectures: str) -> Pool:
    """Donors cut everywhere and calibrated on digits of 32 pixels."""
    pool = Pool(
        [donor(name) for name in architectures],
        (3, 32, 32),
        settings=CalibrationSettings(granularity="all", readout="last"),
    )
    pool.calibrate([digits(32, 32)[0]])
    return pool


def composed(*fragments: tuple[str, str | None, str | None], share_weights: bool = False) -> StitchedNetwork:
    """A network of its own of the fragments named, with stitches fitted on digits."""
    pool = calibrated_pool(*sorted({name for name, _, _ in fragments}))
    return pool.assemble(pool.stitch(fragments), share_weights=share_weights)


def path(candidate: Candidate) -> list[tuple[str, str | None, str | None]]:
    """A candidate's runs as (source, start, end)."""
    return [(run.ref.source, run.ref.start, run.ref.end) for run in candidate.recipe.runs]


@contextmanager
def pieces_run(pool: Pool) -> Iterator[list[str]]:
    """The source of each piece that a pool runs, whatever for."""
    ran: list[str] = []
    hooks = [
        piece.register_forward_pre_hook(lambda module, inputs, name=part.name: ran.append(name))
        for part in pool.parts
        for piece in part.pieces
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def records(result: SearchResult) -> list[tuple[object, ...]]:
    """All that a search found, in its order, but for the time that it took."""
    return [(r.candidate.kind, r.candidate.recipe.to_dict(), r.scores, r.latency_ms) for r in result.ranked]


def bare_candidate(source: str = "a", product: float = 1.0, kind: Kind = "stitched") -> Candidate:
    """What rankings look at, with nothing to run."""
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    ref = SourceRef(source, source, "timm", source, "sha256:0", preprocessing)
    recipe = Recipe.chain(
        (ref,),
        (FragmentRef(source, None, None),),
        num_features=2,
        input_size=(3, 8, 8),
        scores={"cka_product": product},
    )
    return Candidate(recipe, kind, ((),), (), Cost(1, 1))


def references(space: SearchSpace) -> list[Candidate]:
    """Every source as it is, and every source stitched to itself at each of its cuts that varies."""
    return [*unmodified(space), *self_stitched(space)]
