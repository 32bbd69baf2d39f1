"""From sources and a few images to a ranked list of networks, without a Trainer.

The order: cut the sources, refuse an impossible budget, run each source once over the calibration images, search, rank
on the selection images, choose. Nothing here sees a test image.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing import Healer
from lightning_stitch.io import Answer, Answers, Journal, Spool
from lightning_stitch.networks import StitchedNetwork, assemble
from lightning_stitch.progress import Progress, Silent, counted, num_images, timed
from lightning_stitch.recipe import FragmentRef
from lightning_stitch.search import (
    NEED_LABELS,
    Beam,
    CompositionCosts,
    Outcome,
    Ranking,
    SearchResult,
    SearchSpace,
    Strategy,
    TimeLimit,
    choose,
    costs_of_pairs,
    early_exits,
    find_ranking,
    follow,
    labelled,
    measured,
    network_latency,
    outcomes,
    piece_latencies,
    rank,
    search_identity,
    self_stitched,
    unmodified,
    until_stopped,
)
from lightning_stitch.settings import LEAN, CalibrationSettings
from lightning_stitch.sources import Source, check_names
from lightning_stitch.stitching import (
    Batch,
    Calibrated,
    Candidate,
    Kind,
    calibrate_once,
    check_same_outputs,
    load_calibration,
    put_down,
    read_again,
    save_calibration,
    saved_settings,
    segment,
)


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
        self.settings = settings or CalibrationSettings()
        check_names([source.name for source in sources], self.settings)
        self.device, self.image_shape = torch.device(device), image_shape
        self.seconds: dict[str, float] = {}
        with timed(self.seconds, "cut"):
            self.parts = [segment(source, self.settings, image_shape) for source in sources]
        self._cutting_seconds = self.seconds["cut"]
        check_same_outputs(self.parts, self.settings)
        for part in self.parts:
            part.to(self.device)
        self.calibrated: list[Calibrated] = []
        self._images_hash = ""
        self._latencies: list[list[float]] | None = None
        self.prepared: dict[bool, CompositionCosts] = {}  # with early exits and without

    @classmethod
    def prepare(
        cls,
        sources: Sequence[Source],
        image_shape: tuple[int, int, int] | None = None,
        *,
        settings: CalibrationSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> Pool:
        """A pool on which `lightning_stitch.compose` answers one request after the other, all that can be done, done.

        Args:
            sources: The sources.
            image_shape: (channels, height, width) of the images; None: what the first source was trained on.
            settings: None: cuts where stages end, few rows, activations in memory, for a leaner search.
            device: Where to run.

        Raises:
            StitchError: As `Pool`.
        """
        native = next((source.preprocessing.input_size for source in sources), (0, 0, 0))
        pool = cls(sources, image_shape or native, settings=settings or LEAN, device=device)
        pool.prepared = {exits: costs_of_pairs(pool.parts, early_exits=exits) for exits in (True, False)}
        return pool

    def calibrate(
        self, images: Iterable[Batch], *, groups: Sequence[Hashable] | None = None, progress: Progress | None = None
    ) -> None:
        """Run each source once over the calibration images, unless the pool was opened with what they gave.

        Args:
            images: Batches (batch, channels, height, width), float, in [0, 1]; iterated once. Labels beside them are
                not looked at.
            groups: For each image the label of what it shows (a photograph, patient or module), of which others may
                be in other images: the images that judge stitches and healing are then whole groups. None: they are
                the last quarter.
            progress: Where to show progress.

        Raises:
            CalibrationError: If there are too few images, or an image or activation is not finite; likewise if there
                are not as many labels as images, or there is but one group.
        """
        with timed(self.seconds, "calibrate"):
            self._calibrate(images, Answers(), progress or Silent(), groups)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Save what `calibrate` gathered, to be searched again without running a source: `Pool.open`.

        Files of tensors (safetensors) and calibration.json; nothing is pickled. They hold every cut's sampled rows and
        its activation of all images, a file a cut, which is in memory while it is written; the sources themselves are
        not saved. A calibration that is there already is replaced when the new one is complete, so that it is usable at
        any moment.

        Args:
            directory: Where to; made if it is not there.

        Raises:
            CalibrationError: If the pool has not been calibrated, or the directory cannot be written to.
        """
        self._check_calibrated()
        save_calibration(Path(directory), self.calibrated, self.settings, self._images_hash)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        sources: Sequence[Source],
        *,
        settings: CalibrationSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> Pool:
        """A pool with the calibration that `save` wrote; `search(None, ...)` and `stitch` need no more images.

        Activations stay in the files and are read a few images at a time, so keep the directory while the pool is used.

        Args:
            directory: Where it was saved.
            sources: The same sources, in any order.
            settings: None: those that it was made with. Others are refused unless they differ only in
                `keep_activations`.
            device: Where to run.

        Raises:
            CalibrationError: If it was made from other sources or with other settings (what differs is named), there is
                none, a file is cut short or damaged, or a newer version wrote it.

        Example:
            >>> pool.save("cells_pool")  # doctest: +SKIP
            >>> result = Pool.open("cells_pool", sources).search(None, selection)  # doctest: +SKIP
        """
        image_shape, saved = saved_settings(Path(directory))
        pool = cls(sources, image_shape, settings=settings or saved, device=device)
        pool.calibrated, pool._images_hash = load_calibration(Path(directory), pool.parts, pool.settings, pool.device)
        return pool

    def search(
        self,
        calibration: Iterable[Batch] | None,
        selection: Iterable[Batch],
        *,
        strategy: Strategy | None = None,
        budget: Budget | None = None,
        ranking: str | Ranking = "auto",
        num_classes: int | None = None,
        ridge: float = 1e-3,
        bias: bool = True,
        max_candidates: int = 64,
        exits: bool = True,
        heal: bool = False,
        time_limit: float | None = None,
        journal: str | os.PathLike[str] | None = None,
        max_healed: int = 16,
        groups: Sequence[Hashable] | None = None,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Compose networks and rank them; the sources as they are, self-stitched and ended early are among them.

        Ctrl-C while it composes ends the composing: what there is by then is ranked and returned. Ctrl-C at any other
        time ends the search.

        Args:
            calibration: Batches of images, (batch, channels, height, width) in [0, 1]; labels are not looked at. None:
                what the pool holds, from `Pool.open` or `calibrate`.
            selection: Batches of images, or of (images, targets as `SelectionData` has them), apart from calibration's.
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
            heal: Whether to heal the layers behind stitches, where that explains more on held-out calibration images
                (`lightning_stitch.healing`).
            time_limit: Seconds from the call after which no more is composed; ranking what there is comes on top. It is
                looked at with every cut and stitch.
            journal: A directory where the search remembers what it found, its calibration too, so that the same search
                can be called again after it was stopped by whatever means, a killed process too, and goes on where it
                was, to the same result. The same search has the same arguments and images; but `max_candidates`,
                `time_limit`, the ranking, `heal` and `max_healed` may be others. None: nothing is remembered.
            max_healed: Most StitchNets that are healed: of each size class those that explain most as they are.
            groups: What each calibration image shows (`calibrate`); None: each shows something else.
            progress: Where to show progress.

        Raises:
            BudgetError: If no network keeps the budget; names the one that comes nearest, and its cost. Where that can
                be known, it comes before any source runs; for a latency before any image is read.
            StitchError: If the ranking is unknown; likewise.
            CalibrationError: If images or labels cannot be used; likewise if a ranking by labels gets none.
            JournalError: If the journal is another search's, in use, or cannot be written; likewise but for images.
        """
        limit, strategy = TimeLimit(time_limit), strategy or Beam()
        budget, progress = budget or Budget(), progress or Silent()
        exits = exits and self.settings.until == "features" and ranking != "cka_product"
        find_ranking(ranking, labelled=True)
        num_selected = num_images(selection)
        if ranking in NEED_LABELS:
            selection = labelled(selection, ranking)
        if calibration is None:
            self._check_calibrated()
        self.seconds = {"cut": self._cutting_seconds}
        with timed(self.seconds, "cut"):
            most = getattr(strategy, "max_fragments", 16)
            costs = CompositionCosts(self.parts, bias=bias, max_fragments=most, early_exits=exits)
            costs.check(budget)
        with Answers() if journal is None else Journal(journal) as kept:
            kept.agree(
                search_identity(self.parts, self.settings, strategy, budget, self.device, ridge=ridge, bias=bias)
            )
            if budget.max_latency_ms is not None:
                with timed(self.seconds, "measure"):
                    pieces = partial(piece_latencies, self.parts, self.device)
                    answer = kept.recall(["latencies of the pieces"], lambda: Answer(self._latencies or pieces()))
                    self._latencies = answer.value
                    costs.time(answer.value)
                    costs.check(budget)
            budget.warn_of_uncounted({part.name: part.graph.uncounted for part in self.parts})
            if calibration is None:
                kept.agree({"calibration images": self._images_hash})
            else:
                with timed(self.seconds, "calibrate"):
                    self._calibrate(calibration, kept, progress, groups)
            space = SearchSpace(
                self.calibrated,
                self.settings,
                costs=costs,
                budget=budget,
                ridge=ridge,
                journal=kept,
                time_limit=limit,
            )
            with timed(self.seconds, "search"):
                candidates, ends = unmodified(space), early_exits(space) if exits else []
                progress.start("composing", max_candidates)
                proposed = chain(self_stitched(space), counted(islice(strategy(space), max_candidates), progress))
                stopped = until_stopped(proposed, candidates)
                # Sources, self-stitched sources, early exits, StitchNets: of equal scores the first in this order wins.
                candidates = sorted([*candidates, *ends], key=lambda candidate: get_args(Kind).index(candidate.kind))
            if heal:
                with timed(self.seconds, "heal"):
                    healer = Healer(self.calibrated, settings=self.settings, ridge=ridge, journal=kept)
                    candidates = healer.heal_finalists(candidates, max_healed=max_healed, progress=progress)
            if calibration is not None:
                for source in self.calibrated:
                    source.release()
            with timed(self.seconds, "rank"):
                progress.start("ranking", num_selected)
                outcomes, labels = self.outcomes(candidates, selection, progress=progress, journal=kept)
                ranked = rank(
                    candidates, outcomes, labels, ranking=ranking, num_classes=num_classes, rejected=space.rejected
                )
            if budget.max_latency_ms is not None:
                with timed(self.seconds, "measure"):
                    ranked = measured(ranked, budget, partial(self._latency, kept), progress)
            return choose(
                ranked,
                budget,
                rejected=space.rejected,
                seconds=self.seconds,
                num_selection_labels=0 if labels is None else len(labels),
                stopped=stopped,
            )

    def outcomes(
        self,
        candidates: Sequence[Candidate],
        batches: Iterable[Batch],
        *,
        progress: Progress,
        journal: Answers | None = None,
    ) -> tuple[list[Outcome], Tensor | None]:
        """Run candidates over images, shared fronts once; gives their features, and the labels where there are any."""
        labels: list[Tensor] = []
        images = read_again(batches, self.image_shape, self.device, labels)
        found = outcomes(candidates, self.parts, images, journal=journal or Answers(), on_batch=progress.advance)
        return found, torch.cat(labels) if labels else None

    def stitch(
        self,
        fragments: Sequence[FragmentRef | tuple[str, str | None, str | None]],
        *,
        ridge: float = 1e-3,
        bias: bool = True,
        heal: bool = False,
    ) -> Candidate:
        """Compose a network from fragments that you name, on the images that `calibrate` got; for `assemble`.

        Args:
            fragments: (source, start, end) in forward order; None: at the image, at the end of the network. Starts and
                ends are cuts that the pool offers.
            ridge: Relative strength of the stitches' fit.
            bias: Whether stitches have a bias.
            heal: Whether to heal the layers behind its stitches, where that explains more on held-out images.

        Raises:
            StitchError: If the fragments make no path; the nearest names of cuts and sources are offered.
            CalibrationError: If the pool has no calibration images, or an activation at a stitch does not vary.

        Example:
            >>> pool.calibrate(loader)  # doctest: +SKIP
            >>> pool.stitch([("cnn", None, "stages.2"), ("vit", "blocks.3", None)])  # doctest: +SKIP
        """
        self._check_calibrated()
        costs = CompositionCosts(self.parts, bias=bias, max_fragments=len(fragments))
        space = SearchSpace(self.calibrated, self.settings, costs=costs, ridge=ridge)
        candidate = follow(space, [f if isinstance(f, FragmentRef) else FragmentRef(*f) for f in fragments])
        return Healer(self.calibrated, settings=self.settings, ridge=ridge).heal(candidate) if heal else candidate

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

    def _calibrate(
        self, images: Iterable[Batch], journal: Answers, progress: Progress, groups: Sequence[Hashable] | None
    ) -> None:
        """Read the images and run each source over them, unless the journal has what that gives."""
        read = put_down(images, self.image_shape, Spool(self.settings.keep_activations), self.device, groups)
        journal.agree({"calibration images": read.hash})
        if read.hash == self._images_hash and self.calibrated and all(source.stored for source in self.calibrated):
            return
        progress.start("calibrating", len(self.parts))
        self.calibrated = calibrate_once(journal.calibration, self.parts, read, self.settings, self.device, progress)
        self._images_hash = read.hash

    def _check_calibrated(self) -> None:
        if not self.calibrated or any(len(s.activations) < len(s.statistics) for s in self.calibrated):
            raise CalibrationError(
                "Calibrate the pool first: pool.calibrate(images), or Pool.open. A search lets go of its images."
            )

    def _latency(self, journal: Answers, candidate: Candidate) -> float:
        def measure() -> Answer:
            return Answer(network_latency(self.assemble(candidate), self.image_shape, self.device))

        return float(journal.recall(["latency", candidate.key], measure).value)
