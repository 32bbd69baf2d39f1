"""From sources and a few images to a ranked list of networks, without a Trainer.

The order: cut the sources, refuse an impossible budget, run each source once over the calibration images, search, rank
on the selection images, choose. Nothing here sees a test image.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.composing.search_steps import SearchSteps
from lightning_stitch.cutting import CutGraph
from lightning_stitch.data import check_batch_labels
from lightning_stitch.errors import CalibrationError, SourceError, StitchError, nearest
from lightning_stitch.healing import Healer
from lightning_stitch.io import Answers, Journal, Spool
from lightning_stitch.networks import StitchedNetwork, assemble
from lightning_stitch.progress import Progress, Silent, timed
from lightning_stitch.recipe import FragmentRef
from lightning_stitch.search import (
    ALONE,
    NEED_LABELS,
    CompositionCosts,
    Outcome,
    Ranks,
    Remembered,
    SearchResult,
    SearchSpace,
    TimeLimit,
    choose,
    costs_of_pairs,
    find_ranking,
    follow,
    keys_worth_keeping,
    outcomes,
    require_labels,
    search_identity,
)
from lightning_stitch.settings import LEAN, CalibrationSettings, SearchSettings, image_shape_of
from lightning_stitch.sources import Source, check_names
from lightning_stitch.stitching import (
    Batch,
    Calibration,
    Candidate,
    Segmented,
    read_images,
    saved_settings,
    segment,
    store_images,
    tree_of,
)


class Pool:
    """Sources cut for images of one shape, ready to be calibrated and searched.

    Threads may share a prepared pool for `lightning_stitch.compose`; one search at a time uses a pool. Ranks of
    `torch.distributed` share the passes of a search where each has such a pool with the same `ranks`.

    Args:
        sources: The sources.
        image_shape: (channels, height, width) of the calibration images; 96 means (3, 96, 96).
        settings: How activations are sampled and scored.
        device: Where to run; the sources' modules are moved there.

    Attributes:
        parts: The sources, cut; `smaller` has by shape those for smaller images that a search asked for.
        calibration: What they gave of the calibration images; None: nothing yet.
        latencies: Of each part's pieces, in milliseconds, once they were measured.
        remembered: What was read of the images that the last search chose by.
        prepared: For `compose`: what compositions cost, with early exits and without.
        ranks: Who shares the passes over images.
        seconds: What each step of the last search took; `peaks` by its end the most memory of the process, in bytes.

    Raises:
        CutError: If a source cannot be cut or does not take such images.
        SourceError: If one is not loaded yet.
        StitchError: If there is no source, two share a name, or networks end at outputs of different widths.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_shape: int | tuple[int, ...],
        *,
        settings: CalibrationSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings or CalibrationSettings()
        if isinstance(sources, str) or not all(isinstance(source, Source) for source in sources):
            raise SourceError(f"A pool takes loaded sources, as load_sources([...]) gives them; found {sources!r}.")
        check_names([source.name for source in sources], self.settings)
        self.device, self.image_shape = torch.device(device), image_shape_of(image_shape)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        with timed(self.seconds, "cut", self.peaks):
            self.parts = [segment(source, self.settings, self.image_shape) for source in sources]
        self._cutting_seconds = self.seconds["cut"]
        _check_together(self.parts, self.settings)
        for part in self.parts:
            part.to(self.device)
        self.smaller: dict[tuple[int, int, int], list[Segmented]] = {}
        self.calibration: Calibration | None = None
        self.latencies: list[list[float]] | None = None
        self.ranks: Ranks = ALONE
        self._in_search = threading.Lock()
        self.remembered = Remembered()
        self.prepared: dict[bool, CompositionCosts] = {}

    @classmethod
    def prepare(
        cls,
        sources: Sequence[Source],
        image_shape: int | tuple[int, ...] | None = None,
        *,
        settings: CalibrationSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> Pool:
        """A pool on which `lightning_stitch.compose` answers one request after the other, all that can be done, done.

        Args:
            sources: The sources.
            image_shape: As for `Pool`; None: what the first source was trained on.
            settings: None: cuts where stages end, few rows, activations in memory, for a leaner search.
            device: Where to run.

        Raises:
            StitchError: As `Pool`.
        """
        native = next((source.preprocessing.input_size for source in sources if isinstance(source, Source)), 1)
        pool = cls(sources, image_shape or native, settings=settings or LEAN, device=device)
        pool.prepared = {exits: costs_of_pairs(pool.parts, early_exits=exits) for exits in (True, False)}
        for part in pool.parts:
            part.fuse()
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
        self._calibrate(images, Answers(), progress or Silent(), groups)

    def extend(
        self,
        source: Source,
        images: Iterable[Batch] = (),
        *,
        groups: Sequence[Hashable] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Add a source. In a calibrated pool it alone runs over the images; what the others gave of them stays.

        Args:
            source: One more, of another name.
            images: The same images, and groups, that the others were calibrated on; in a pool that is not calibrated
                yet they are not looked at.
            groups: As in `calibrate`.
            progress: Where to show progress.

        Raises:
            CutError: If the source cannot be cut or does not take images of the pool's shape.
            StitchError: If its name is taken, or its outputs are of another width than those that networks end at.
            CalibrationError: If these are other images, or a search has let go of what the others gave.
        """
        check_names([*(part.name for part in self.parts), source.name], self.settings)
        with self._one_search():
            part = segment(source, self.settings, self.image_shape)
            _check_together([*self.parts, part], self.settings)
            part.to(self.device)
            if self.calibration is not None:
                whole = self._whole_calibration()
                read = store_images(
                    images, self.image_shape, Spool(self.settings.keep_activations), self.device, groups
                )
                if read.hash != whole.images_hash:
                    raise CalibrationError(
                        "The pool's other sources were calibrated on other images, or groups. Give the same ones, in "
                        "the same order, or calibrate all sources anew: pool.calibrate(images)."
                    )
                (more,) = Calibration.of(
                    [part], read, self.settings, device=self.device, progress=progress or Silent()
                ).sources
                self.calibration = dataclasses.replace(whole, sources=(*whole.sources, more))
            self.parts.append(part)
            self.smaller, self.latencies, self.prepared = {}, None, {}

    def __repr__(self) -> str:
        names = ", ".join(part.name for part in self.parts)
        calibrated = "" if self.calibration is None else ", calibrated"
        return f"Pool({names}; images {'x'.join(map(str, self.image_shape))}{calibrated})"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Save what `calibrate` gathered, to be searched again without running a source: `Pool.open`.

        Files of tensors (safetensors) and calibration.json; nothing is pickled. They hold every cut's sampled rows and
        its activation of all images; the sources themselves are not saved. A calibration that is there already is
        replaced when the new one is complete, so that it is usable at any moment.

        Args:
            directory: Where to; made if it is not there.

        Raises:
            CalibrationError: If the pool has not been calibrated, or the directory cannot be written to.
        """
        self._whole_calibration().save(Path(directory))

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
        pool.calibration = Calibration.open(Path(directory), pool.parts, pool.settings, pool.device)
        return pool

    def search(
        self,
        calibration: Iterable[Batch] | None,
        selection: Iterable[Batch],
        settings: SearchSettings | None = None,
        *,
        num_classes: int | None = None,
        groups: Sequence[Hashable] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> SearchResult:
        """Compose networks and rank them; the sources as they are, self-stitched and ended early are among them.

        Ctrl-C while it composes ends the composing: what there is by then is ranked and returned. Ctrl-C at any other
        time ends the search.

        Args:
            calibration: Batches of images, (batch, channels, height, width) in [0, 1]; labels are not looked at. None:
                what the pool holds, from `Pool.open` or `calibrate`.
            selection: Batches of images, or of (images, targets as `SelectionData` has them), apart from calibration's.
            settings: What to propose and by what to choose; None: the defaults.
            num_classes: Number of classes, where there are labels.
            groups: What each calibration image shows (`calibrate`); None: each shows something else.
            progress: Where to show progress.
            options: Fields of `SearchSettings`, in place of those of `settings`.

        Raises:
            BudgetError: If no network keeps the budget; names the one that comes nearest, and its cost. Where that can
                be known, it comes before any source runs; for a latency before any image is read.
            StitchError: If the ranking is unknown; likewise. If the pool is in another search.
            CalibrationError: If images or labels cannot be used; likewise if a ranking by labels gets none.
            JournalError: If the journal is another search's, in use, or cannot be written; likewise but for images.
        """
        settings, progress = dataclasses.replace(settings or SearchSettings(), **options), progress or Silent()
        limit = TimeLimit(settings.time_limit)
        find_ranking(settings.ranking, labelled=True)
        if settings.ranking in NEED_LABELS:
            selection = require_labels(selection)
        if iter(selection) is not selection:  # a look at the first batch, where that does not use it up
            next(check_batch_labels(selection, num_classes), None)
        if calibration is None:
            self._whole_calibration()
        with self._one_search(), Answers() if settings.journal is None else Journal(settings.journal) as journal:
            self.seconds = {"cut": self._cutting_seconds}
            steps = SearchSteps(self, settings, num_classes=num_classes, journal=journal, progress=progress)
            costs, smaller = steps.costs()
            journal.agree(search_identity(self.parts, self.settings, settings, self.device))
            steps.time_pieces(costs, smaller)
            settings.limits.warn_of_uncounted({part.name: part.graph.uncounted for part in self.parts})
            if calibration is not None:
                self._calibrate(calibration, journal, progress, groups)
            whole = self._whole_calibration()
            journal.agree({"calibration images": whole.images_hash})
            space = SearchSpace(
                whole.sources,
                self.settings,
                costs=costs,
                budget=settings.limits.of_all_images,
                ridge=settings.ridge,
                journal=journal,
                time_limit=limit,
            )
            candidates, stopped = steps.compose(space, smaller)
            if settings.heal:
                with timed(self.seconds, "heal", self.peaks):
                    healer = Healer(whole.sources, settings=self.settings, ridge=settings.ridge, journal=journal)
                    candidates = healer.heal_finalists(candidates, max_healed=settings.max_healed, progress=progress)
            if calibration is not None:
                whole.release()
            with timed(self.seconds, "rank", self.peaks):
                ranked, num_labels = steps.rank(candidates, selection, space)
            self.remembered.keep(keys_worth_keeping(ranked))
            ranked = steps.measure(ranked)
            return choose(
                ranked,
                settings.limits,
                rejected=space.rejected,
                seconds=self.seconds,
                peaks=dict(self.peaks),
                num_selection_labels=num_labels,
                stopped=stopped,
            )

    def outcomes(
        self,
        candidates: Sequence[Candidate],
        batches: Iterable[Batch],
        *,
        progress: Progress,
        journal: Answers | None = None,
        num_classes: int | None = None,
    ) -> tuple[list[Outcome], Tensor | None]:
        """Run candidates over images, shared fronts once; gives their features, and the labels where there are any.

        What was read of the images that the last search chose by is remembered of its best candidates.
        """
        labels: list[Tensor] = []
        batches = check_batch_labels(batches, num_classes)
        images = read_images(batches, self.image_shape, self.device, labels)
        results = outcomes(
            candidates,
            self.all_parts,
            images,
            journal=journal or Answers(),
            remembered=self.remembered,
            ranks=self.ranks,
            on_batch=progress.advance,
        )
        return results, torch.cat(labels) if labels else None

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
        sources = self._whole_calibration().sources
        costs = CompositionCosts(self.parts, bias=bias, max_fragments=len(fragments))
        space = SearchSpace(sources, self.settings, costs=costs, ridge=ridge)
        candidate = follow(space, [f if isinstance(f, FragmentRef) else FragmentRef(*f) for f in fragments])
        return Healer(sources, settings=self.settings, ridge=ridge).heal(candidate) if heal else candidate

    def assemble(self, candidate: Candidate, *, share_weights: bool = False) -> StitchedNetwork:
        """A candidate as a network of its own: copies of the fragments, folds done.

        Args:
            candidate: What a search found, or `stitch` made.
            share_weights: Whether fragments of one source share what they have in common (`Recipe.share_weights`).
        """
        recipe = dataclasses.replace(candidate.recipe, share_weights=share_weights)
        fragments = tree_of(candidate.ways, candidate.reads, self.all_parts).fragments
        stitches = [fragment.stitch for fragment in fragments]
        return assemble(recipe, self.graphs, stitches, [fragment.tensors for fragment in fragments])

    @property
    def all_parts(self) -> list[Segmented]:
        """The sources for images of the pool's size, then those for smaller ones that a search asked for."""
        return [*self.parts, *chain.from_iterable(self.smaller.values())]

    @property
    def graphs(self) -> dict[str, CutGraph]:
        """The cut graph of each source, by name."""
        return {part.name: part.graph for part in self.parts}

    @contextmanager
    def _one_search(self) -> Iterator[None]:
        if not self._in_search.acquire(blocking=False):
            raise StitchError("This pool is in another search, of another thread. Wait for it, or make a second pool.")
        try:
            yield
        finally:
            self._in_search.release()

    def _calibrate(
        self, images: Iterable[Batch], journal: Answers, progress: Progress, groups: Sequence[Hashable] | None
    ) -> None:
        """Read the images and run each source over them, unless the pool or the journal has what that gives."""
        with timed(self.seconds, "calibrate", self.peaks):
            read = store_images(images, self.image_shape, Spool(self.settings.keep_activations), self.device, groups)
            journal.agree({"calibration images": read.hash})
            if self.calibration and self.calibration.is_stored and self.calibration.images_hash == read.hash:
                return
            self.calibration = Calibration.of(
                self.parts, read, self.settings, device=self.device, progress=progress, directory=journal.calibration
            )

    def _whole_calibration(self) -> Calibration:
        if self.calibration is None or not self.calibration.is_whole:
            raise CalibrationError(
                "Calibrate the pool first: pool.calibrate(images), or Pool.open. A search lets go of its images."
            )
        return self.calibration


def _check_together(parts: Sequence[Segmented], settings: CalibrationSettings) -> None:
    """Refuse, with a StitchError, sources that end at outputs of several widths, and a readout that none offers."""
    widths = {part.name: part.graph.output_features() for part in parts if settings.until == "output"}
    if len(set(widths.values())) > 1:
        raise StitchError(
            f"Networks that end at a source's output need sources with the same outputs; found widths {widths}. "
            f"Leave the odd ones out, or end at the features and fit a head."
        )
    if not isinstance(settings.readout, str):
        offered = [cut.name for part in parts for cut in part.cuts]
        if strangers := [name for name in settings.readout if name not in offered]:
            raise StitchError(
                f"readout= names {strangers}, which no source offers as cuts. Nearest to the first: "
                f"{nearest(strangers[0], offered)}."
            )
