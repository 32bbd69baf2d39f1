"""From sources and a few images to a ranked list of networks, without a Trainer.

The order: cut the sources, refuse an impossible budget, run each source once over the calibration images, search, rank
on the selection images, choose. Nothing here sees a test image.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, compress, islice

import torch
from torch import Tensor

from lightning_stitch._spool import Carried, Spool
from lightning_stitch.activations import Calibrated, calibrate
from lightning_stitch.candidates import Candidate
from lightning_stitch.compositions import CompositionCosts
from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.latency import network_latency, piece_latencies
from lightning_stitch.network import StitchedNetwork, assemble
from lightning_stitch.paths import early_exits, follow, references
from lightning_stitch.prefix_tree import Outcome, PrefixTree
from lightning_stitch.progress import Progress, Silent, num_images
from lightning_stitch.ranking import (
    MISSING_LABELS,
    NEED_LABELS,
    Ranking,
    SelectionData,
    find_ranking,
)
from lightning_stitch.recipe import FragmentRef
from lightning_stitch.refinement import FITS, check_refinements, refined
from lightning_stitch.results import Ranked, SearchResult, choose
from lightning_stitch.search import Beam, Strategy
from lightning_stitch.segments import CalibrationSettings, segment
from lightning_stitch.sources import Source
from lightning_stitch.space import SearchSpace


class Pool:
    """Sources cut for images of one shape, ready to be calibrated and searched.

    Args:
        sources: The sources.
        image_shape: (channels, height, width) of the calibration images.
        settings: How activations are sampled and scored.
        device: Where to run; the sources' modules are moved there.

    Raises:
        CutError: If a source cannot be cut or does not take such images.
        StitchError: If there is no source, two share a name, or networks end at outputs of different widths.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_shape: tuple[int, int, int],
        *,
        settings: CalibrationSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not sources:
            raise StitchError("A pool needs at least one source.")
        self.settings = settings or CalibrationSettings()
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise StitchError(f"Sources of a pool need names of their own; found {names}. load_source takes a name=.")
        if isinstance(self.settings.granularity, Mapping):
            strangers = sorted(set(self.settings.granularity) - set(names))
            if strangers:
                raise StitchError(f"granularity= names {strangers}, but the sources are {names}.")
        self.device = torch.device(device)
        self.image_shape = image_shape
        self.seconds: dict[str, float] = {}
        with self._timed("cut"):
            self.parts = [segment(source, self.settings, image_shape) for source in sources]
        self._cutting_seconds = self.seconds["cut"]
        self._check_outputs()
        for part in self.parts:
            part.source.module.to(self.device)
            part.preprocess.to(self.device)
            for piece in part.pieces:
                piece.to(self.device)
        self.calibrated: list[Calibrated] = []
        self._latencies: list[list[float]] | None = None

    def calibrate(self, images: Iterable[Tensor | Sequence[Tensor]], *, progress: Progress | None = None) -> None:
        """Run each source once over the calibration images.

        Args:
            images: Batches (batch, channels, height, width), float, in [0, 1]; iterated once. Labels beside them are
                not looked at.
            progress: Where to show progress.

        Raises:
            CalibrationError: If there are too few images, or an image or activation is not finite.
        """
        progress = progress or Silent()
        with self._timed("calibrate"):
            count, kept, spool = 0, [], Spool(self.settings.keep_activations)
            for batch in map(_images_of, images):
                _check_images(batch, self.image_shape)
                kept.append(spool.put(batch.to(self.device, torch.float32)))
                count += len(batch)
            if count < 4:
                raise CalibrationError(f"Calibration needs at least 4 images; found {count}.")
            progress.start("calibrating", len(self.parts))
            self.calibrated = []
            for part in self.parts:
                self.calibrated.append(calibrate(part, Carried(kept), self.settings))
                progress.advance(1)

    def search(
        self,
        calibration: Iterable[Tensor | Sequence[Tensor]],
        selection: Iterable[Tensor | Sequence[Tensor]],
        *,
        strategy: Strategy | None = None,
        budget: Budget | None = None,
        ranking: str | Ranking = "auto",
        num_classes: int | None = None,
        ridge: float = 1e-3,
        bias: bool = True,
        max_candidates: int = 64,
        exits: bool = True,
        refinements: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> SearchResult:
        """Compose networks and rank them; the sources as they are, self-stitched and ended early are among them.

        Args:
            calibration: Batches of images, (batch, channels, height, width) in [0, 1]; labels are not looked at.
            selection: Batches of images, or of (images, labels) with integer labels, apart from the calibration's.
            strategy: A generator of candidates; None: `Beam()`.
            budget: Limits that the chosen network and all StitchNets of the result keep; None: none.
            ranking: Name of a ranking (`ranking.RANKINGS`), "auto" ("loo_soft_r2" with labels, "consensus" without), or
                a function.
            num_classes: Number of classes, where there are labels.
            ridge: Relative strength of the stitches' fit; 0 is the paper's.
            bias: Whether stitches have a bias; False is the paper's.
            max_candidates: Most StitchNets that are ranked.
            exits: Whether sources that end at one of their cuts, averaged over its positions, are candidates too. They
                are not where networks end at an output, nor under the ranking "cka_product", which would give each of
                them the highest score, as they have no stitch.
            refinements: What to try on each network, and keep where it explains more on held-out calibration images:
                other fits of its stitches ("open_loop", "row_weights", `lightning_stitch.stitches.fit_rows`), and after
                it is composed its "batch_norm" statistics (`lightning_stitch.refinement`).
            progress: Where to show progress.

        Raises:
            BudgetError: If no network keeps the budget; names the one that comes nearest, and its cost. Where that can
                be known, it comes before any source runs; for a latency before any image is read.
            StitchError: If the ranking is unknown; likewise.
            CalibrationError: If images or labels cannot be used; likewise if a ranking by labels gets none.
        """
        strategy, budget, progress = strategy or Beam(), budget or Budget(), progress or Silent()
        exits = exits and self.settings.until == "features" and ranking != "cka_product"
        find_ranking(ranking, labelled=True)
        check_refinements(refinements)
        num_selected = num_images(selection)
        if ranking in NEED_LABELS:
            selection = _labelled(selection)
        self.seconds = {"cut": self._cutting_seconds}
        with self._timed("cut"):
            most = getattr(strategy, "max_fragments", 16)
            costs = CompositionCosts(self.parts, bias=bias, max_fragments=most, early_exits=exits)
            costs.check(budget)
        if budget.max_latency_ms is not None:
            with self._timed("measure"):
                if self._latencies is None:
                    self._latencies = piece_latencies(self.parts, self.device)
                costs.time(self._latencies)
                costs.check(budget)
        budget.warn_of_uncounted({part.name: part.graph.uncounted for part in self.parts})
        self.calibrate(calibration, progress=progress)
        space = SearchSpace(
            self.calibrated,
            self.settings,
            costs=costs,
            budget=budget,
            ridge=ridge,
            fits=[name for name in refinements if name in FITS],
        )
        with self._timed("search"):
            candidates = references(space) + (early_exits(space) if exits else [])
            progress.start("composing", max_candidates)
            for candidate in islice(strategy(space), max_candidates):
                candidates.append(candidate)
                progress.advance(1)
        changes = [name for name in refinements if name not in FITS]
        if changes:
            progress.start("refining", len(candidates))
            with self._timed("refine"):
                for index in range(len(candidates)):
                    for name in changes:
                        candidates[index] = refined(candidates[index], self.calibrated, name)
                    progress.advance(1)
        for source in self.calibrated:
            source.release()
        with self._timed("rank"):
            ranked, num_labels = self._rank(
                candidates, selection, ranking, num_classes, space.rejected, progress, num_selected
            )
        if budget.max_latency_ms is not None:
            with self._timed("measure"):
                ranked = self._measured(ranked, budget, progress)
        return choose(ranked, budget, rejected=space.rejected, seconds=self.seconds, num_selection_labels=num_labels)

    def outcomes(
        self, candidates: Sequence[Candidate], batches: Iterable[Tensor | Sequence[Tensor]], *, progress: Progress
    ) -> tuple[list[Outcome], Tensor | None]:
        """Run candidates over images, shared fronts once; gives their features, and the labels where there are any."""
        labels: list[Tensor] = []
        tree = PrefixTree(candidates, self.parts)
        found = tree.run(self._images(batches, labels), on_batch=progress.advance)
        return found, torch.cat(labels) if labels else None

    def stitch(
        self,
        fragments: Sequence[FragmentRef | tuple[str, str | None, str | None]],
        *,
        ridge: float = 1e-3,
        bias: bool = True,
    ) -> Candidate:
        """Compose a network from fragments that you name, on the images that `calibrate` got; for `assemble`.

        Args:
            fragments: (source, start, end) in forward order; None: at the image, at the end of the network. Starts and
                ends are cuts that the pool offers.
            ridge: Relative strength of the stitches' fit.
            bias: Whether stitches have a bias.

        Raises:
            StitchError: If the fragments make no path; the nearest names of cuts and sources are offered.
            CalibrationError: If the pool has no calibration images, or an activation at a stitch does not vary.

        Example:
            >>> pool.calibrate(loader)  # doctest: +SKIP
            >>> pool.stitch([("cnn", None, "stages.2"), ("vit", "blocks.3", None)])  # doctest: +SKIP
        """
        if not any(source.activations for source in self.calibrated):
            raise CalibrationError("Calibrate the pool first: pool.calibrate(images). A search lets go of its images.")
        costs = CompositionCosts(self.parts, bias=bias, max_fragments=len(fragments))
        space = SearchSpace(self.calibrated, self.settings, costs=costs, ridge=ridge)
        return follow(space, [f if isinstance(f, FragmentRef) else FragmentRef(*f) for f in fragments])

    def assemble(self, candidate: Candidate, *, share_weights: bool = False) -> StitchedNetwork:
        """A candidate as a network of its own: copies of the fragments, folds done.

        Args:
            candidate: What a search found, or `stitch` made.
            share_weights: Whether fragments of one source share what they have in common (`Recipe.share_weights`).
        """
        recipe = dataclasses.replace(candidate.recipe, share_weights=share_weights)
        graphs = {part.name: part.graph for part in self.parts}
        stitches = [step.stitch for step in candidate.steps[1:]]
        return assemble(recipe, graphs, stitches, [step.tensors for step in candidate.steps])

    def _images(self, batches: Iterable[Tensor | Sequence[Tensor]], labels: list[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            images = _images_of(batch)
            if not isinstance(batch, Tensor) and len(batch) > 1:
                labels.append(torch.as_tensor(batch[1]).cpu())
            _check_images(images, self.image_shape)
            yield images.to(self.device, torch.float32)

    def _rank(
        self,
        candidates: list[Candidate],
        selection: Iterable[Tensor | Sequence[Tensor]],
        ranking: str | Ranking,
        num_classes: int | None,
        rejected: Counter[str],
        progress: Progress,
        num_selected: int | None,
    ) -> tuple[list[Ranked], int]:
        progress.start("ranking", num_selected)
        outcomes, labels = self.outcomes(candidates, selection, progress=progress)
        own = {c.recipe.fragments[-1].source: outcomes[i].features for i, c in enumerate(candidates[: len(self.parts)])}
        usable = [c.kind == "source" or _is_usable(outcomes[i].features) for i, c in enumerate(candidates)]
        if not all(usable):
            rejected["features not finite or constant on the selection images"] = usable.count(False)
        candidates, outcomes = list(compress(candidates, usable)), list(compress(outcomes, usable))
        data = SelectionData(
            features=[outcome.features for outcome in outcomes],
            targets=labels,
            own_features=[own[c.recipe.fragments[-1].source] for c in candidates],
            num_classes=num_classes if num_classes is not None or labels is None else int(labels.max()) + 1,
        )
        scores = find_ranking(ranking, labelled=labels is not None)(candidates, data)
        ranked = [
            _ranked(candidate, {name: float(value) for name, value in score.items()}, outcome)
            for candidate, score, outcome in zip(candidates, scores, outcomes, strict=True)
        ]
        # Equal scores keep the order of the search, in which the sources come first: a tie is no win over a source.
        ranked.sort(key=lambda r: tuple(-value for value in r.scores.values()))
        return ranked, 0 if labels is None else len(labels)

    def _measured(self, ranked: list[Ranked], budget: Budget, progress: Progress) -> list[Ranked]:
        """The same, with the latencies of those that keep all other limits, each assembled and run."""
        progress.start("measuring", len(ranked))
        found = []
        for r in ranked:
            if budget.allows(r.candidate.cost) and r.reaches(budget.min_score):
                latency = network_latency(self.assemble(r.candidate), self.image_shape, self.device)
                scores = {**r.candidate.recipe.scores, "latency_ms": latency}
                recipe = dataclasses.replace(r.candidate.recipe, scores=scores)
                candidate = dataclasses.replace(r.candidate, recipe=recipe)
                r = dataclasses.replace(r, candidate=candidate, latency_ms=latency)
            found.append(r)
            progress.advance(1)
        return found

    def _check_outputs(self) -> None:
        if self.settings.until != "output":
            return
        widths = {part.name: part.graph.output_features() for part in self.parts}
        if len(set(widths.values())) > 1:
            raise StitchError(
                f"Networks that end at a source's output need sources with the same outputs; found widths {widths}. "
                f"Leave the odd ones out, or end at the features and fit a head."
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


def _ranked(candidate: Candidate, scores: dict[str, float], outcome: Outcome) -> Ranked:
    recipe = dataclasses.replace(candidate.recipe, scores={**scores, **candidate.recipe.scores})
    return Ranked(dataclasses.replace(candidate, recipe=recipe), scores, outcome.features.shape[1], outcome.seconds)


def _is_usable(features: Tensor) -> bool:
    """Whether a ranking can tell the images apart by these features."""
    return bool(torch.isfinite(features).all()) and bool((features != features[0]).any())


def _labelled(batches: Iterable[Tensor | Sequence[Tensor]]) -> Iterator[Tensor | Sequence[Tensor]]:
    """The same batches, once the first is seen to have labels."""
    iterator = iter(batches)
    first = next(iterator, None)
    if isinstance(first, Tensor) or (first is not None and len(first) < 2):
        raise CalibrationError(MISSING_LABELS)
    return chain([] if first is None else [first], iterator)


def _images_of(batch: Tensor | Sequence[Tensor]) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def _check_images(images: Tensor, image_shape: tuple[int, int, int]) -> None:
    if tuple(images.shape[1:]) != image_shape:
        raise CalibrationError(
            f"Images must come in batches of (batch, {', '.join(map(str, image_shape))}), channels first; found "
            f"{tuple(images.shape)}."
        )
    if not images.is_floating_point() or not torch.isfinite(images).all():
        raise CalibrationError("Images must be finite floats in [0, 1]; found NaN, infinity or another dtype.")
