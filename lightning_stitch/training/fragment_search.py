"""FragmentSearch: run the fragment search before fitting, inside the Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.hooks import RemovableHandle

from lightning_stitch._lightning import check_same_namespace, isolate_rng, pl, warn_where_both_are_loaded
from lightning_stitch.composing import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import BudgetError, StitchError
from lightning_stitch.progress import Bar, Progress, Silent
from lightning_stitch.report import MARGIN, Comparison, check_margin, compare
from lightning_stitch.search import ALONE, DistributedRanks, Ranked, Ranks, SearchResult, Strategy, find_ranking
from lightning_stitch.settings import (
    CalibrationSettings,
    Estimator,
    Keeping,
    SearchSettings,
    documents_options_of,
)
from lightning_stitch.sources import (
    Blueprint,
    Source,
    find_sources,
    fitting_sources,
    load_sources,
    preflight,
    print_preflight,
    require,
    without_strangers,
)
from lightning_stitch.stitching import Candidate, Kind, WithoutLabels
from lightning_stitch.training.backbone_place import restore_when_loaded
from lightning_stitch.training.callback_order import check_order
from lightning_stitch.training.module import StitchedClassifier
from lightning_stitch.training.places import Place, place_for_network
from lightning_stitch.training.search_report import report_search


@documents_options_of(SearchSettings, CalibrationSettings)
class FragmentSearch(pl.Callback):
    """Composes a network from sources before fitting and installs it, with a closed-form head, in the module.

    It runs in `setup` of the fit stage, before optimizers are built, and only if the module has no recipe. With
    `Trainer(max_epochs=0)` that is all: no back-propagation, and `stitched.ckpt` is the best checkpoint. Every
    candidate with its costs and scores goes into candidates.csv in the log directory, all of it into report.html;
    `install_within` takes another of them afterwards.

    The module is a `StitchedClassifier`, or any LightningModule with the `attribute` that its backbone is in; the data
    module is a `CalibrationDataModule`. Ctrl-C while it composes ends the composing, not the run: the best network by
    then is installed, and fitting goes on. At any other time Ctrl-C ends the run as everywhere in Lightning.

    Args:
        sources: What to compose from: source specs (see `load_source`), or mappings with "spec" and its arguments.
        compare: For classes only: also evaluate all sources, their self-stitched forms and the best StitchNets on the
            test images, print the table and write comparison.csv and comparison.json in the log directory. The test
            images choose nothing.
        fractions: Shares of the smallest source's MACs under which the comparison shows the best StitchNet and
            the best early exit.
        margin: The least difference in accuracy that counts in the comparison's verdicts (`report.judge`).
        attribute: Where in a LightningModule of your own the network goes, as "backbone" or "model.encoder": a
            `StitchedBackbone`, or any network that gives vectors (batch, width) for images; the new one's features are
            mapped, by least squares on the head images, onto those. A module with a method
            `on_backbone_stitched(self, backbone)` is told instead, and nothing is mapped. None: the module is a
            `StitchedClassifier`.
        head_attribute: Where in such a module the linear layer from these vectors to the classes is, to be fitted in
            closed form; None: the module's head is left as it is.
        skip_rejected: Whether to go on without sources that the check before any download rejects (`preflight`). By
            default that is an error, which shows the table.

    Attributes:
        search_settings: What is proposed, and by what it is chosen.
        calibration_settings: How activations are sampled and scored; where networks end follows from the head.
        ckpt_path: A checkpoint file that the coming `fit` restores: its network is taken, and nothing is searched. None
            by default; `lightning-stitch fit --ckpt_path FILE` sets it.
        pool: The sources, cut, that the search composed from; None before it ran.
        result: What the search found; None before it ran.
        comparison: The table, if asked for.
        checkpoint: Where the last `fit` left the network, if it searched and trained nothing.
    """

    def __init__(
        self,
        sources: Sequence[str | dict[str, Any]],
        strategy: Strategy | None = None,
        budget: Budget | None = None,
        granularity: str | list[str] | dict[str, Any] = "blocks",
        estimator: Estimator = "debiased",
        rows_per_image: int = 32,
        ridge: float = 1e-3,
        bias: bool = True,
        ranking: str = "auto",
        max_candidates: int = 64,
        exits: bool = True,
        readout: str | list[str] | None = None,
        sizes: list[int] | None = None,
        max_roots: int = 3,
        max_stages: int = 3,
        heal: bool = False,
        max_healed: int = 16,
        compare: bool = False,
        fractions: Sequence[float] = (0.75, 0.5, 1 / 3),
        margin: float = MARGIN,
        seed: int = 0,
        keep_activations: Keeping = "disk",
        time_limit: float | None = None,
        journal: str | Path | None = None,
        attribute: str | None = None,
        head_attribute: str | None = None,
        skip_rejected: bool = False,
    ) -> None:
        warn_where_both_are_loaded()
        self.sources = list(sources)
        self.search_settings = SearchSettings(
            strategy=strategy,
            budget=budget,
            ranking=ranking,
            ridge=ridge,
            bias=bias,
            max_candidates=max_candidates,
            exits=exits,
            sizes=sizes,
            max_roots=max_roots,
            max_stages=max_stages,
            heal=heal,
            max_healed=max_healed,
            time_limit=time_limit,
            journal=journal,
        )
        self.calibration_settings = CalibrationSettings(
            granularity=granularity,
            estimator=estimator,
            rows_per_image=rows_per_image,
            readout="all" if readout is None else readout,
            seed=seed,
            keep_activations=keep_activations,
        )
        self.chooses_readout = readout is None
        self.compare = compare
        self.fractions = tuple(fractions)
        check_margin(margin)
        self.margin = margin
        self.pool: Pool | None = None
        self.attribute = attribute
        self.head_attribute = head_attribute
        self.skip_rejected = skip_rejected
        self.ckpt_path: str | Path | None = None
        self.result: SearchResult | None = None
        self.comparison: Comparison | None = None
        self._fetched: list[Source] | None = None
        self._found: Sequence[Blueprint] | None = None  # looked up, not checked yet
        self._usable: Sequence[Blueprint] | None = None  # checked, not loaded yet
        self._restoring: RemovableHandle | None = None
        self.checkpoint: Path | None = None
        self._directory: Path | None = None  # of what the search reported

    def check_sources(
        self, image_shape: Callable[[], tuple[int, int, int] | None], *, until: str, show: bool
    ) -> Sequence[Blueprint]:
        """The sources that can be used, checked before their weights are fetched; prints the table if asked."""
        settings, skip = self.settings_until(until), self.skip_rejected
        sources, self._found = self._found or self.sources, None
        checked = preflight(sources, image_shape=image_shape, settings=settings, regardless=skip)
        require(checked, skip_rejected=skip)
        if show:
            print_preflight(checked)
        self._usable = checked.blueprints
        return self._usable

    def fetch_sources(self) -> None:
        """Load the sources, from the hub if need be; those only that passed, where they have been checked."""
        if self._fetched is None:
            self._fetched = load_sources(self.sources if self._usable is None else self._usable)

    def look_up_sources(self, trainer: pl.Trainer) -> None:
        """Refuse sources that cannot be found, before images are downloaded, if this run will search."""
        if not self.skip_rejected and self._searches_in(trainer):
            self._found = find_sources(self.sources)

    def prepare_sources(self, trainer: pl.Trainer) -> None:
        """Check and load the sources if this run will search; the data module's `prepare_data` calls it on each node.

        There waiting has no time limit.
        """
        if not self._searches_in(trainer):
            return
        module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        place = place_for_network(module, self.attribute, self.head_attribute)

        def image_shape() -> tuple[int, int, int] | None:
            if data.is_wrapper and trainer.world_size > 1:
                return None  # its setup may wait for ranks that are not here
            return self.check_run(trainer, module, data)[1].image_shape

        self._prepare(trainer, place, image_shape)

    def _prepare(
        self, trainer: pl.Trainer, place: Place, image_shape: Callable[[], tuple[int, int, int] | None]
    ) -> None:
        # The other ranks of a node find its files in the cache, but must leave the same sources out.
        if self._fetched is None and (trainer.local_rank == 0 or self.skip_rejected):
            show = trainer.progress_bar_callback is not None and trainer.is_global_zero
            self.check_sources(image_shape, until=place.head_settings.until, show=show)
        self.fetch_sources()

    def _searches_in(self, trainer: pl.Trainer) -> bool:
        """Whether a run will search and has no sources yet."""
        if self._fetched is not None or self.ckpt_path is not None or trainer.state.fn != "fit":
            return False
        check_order(trainer, self)
        return place_for_network(trainer.lightning_module, self.attribute, self.head_attribute).recipe is None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Search, install the network and its head, and compare if asked to."""
        self.teardown(trainer, pl_module, stage)  # for a run that failed before its own
        if self.attribute is not None:
            self._restoring = restore_when_loaded(pl_module, self.attribute)
        if stage != "fit":
            return
        self.checkpoint = self._directory = None
        place, data = self.check_run(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        check_order(trainer, self)
        if place.recipe is not None:
            if self.result is None:
                pl.utilities.rank_zero_info(  # no warning: a run that is resumed has its search, too
                    "FragmentSearch does nothing: the module has a network already, which fit goes on with. Give fit a "
                    "module without one to search again."
                )
            return
        if self.ckpt_path is not None:
            # Now, for callbacks behind this one that copy or freeze the module in their own setup.
            place.restore(trainer.strategy.checkpoint_io.load_checkpoint(self.ckpt_path, map_location="cpu"))
            return
        if isinstance(pl_module, StitchedClassifier):
            pl_module.check_stage(stage)
        ranks = _ranks_of(trainer)
        # The first rank of each node fetches before the others.
        for is_turn in (trainer.local_rank == 0, trainer.local_rank != 0):
            with ranks.together():
                if is_turn:
                    self._prepare(trainer, place, lambda: data.image_shape)
        with ranks.together():
            assert self._fetched is not None
            settings, skip = self.settings_until(place.head_settings.until), self.skip_rejected
            sources = fitting_sources(self._fetched, data.image_shape, settings, skip_rejected=skip)
        show = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with isolate_rng(), Bar() if show else Silent() as progress:
            result = self._search(trainer, place, data, sources, ranks, progress)
        self._fetched = self._usable = None
        self._directory = report_search(trainer, self, result)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where nothing trained leave `stitched.ckpt` beside the report, for `test(ckpt_path="best")`."""
        saver, directory = trainer.checkpoint_callback, self._directory
        if directory is None or saver is None or trainer.max_epochs != 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.checkpoint = directory / "stitched.ckpt"
        trainer.save_checkpoint(self.checkpoint)
        saver.best_model_path = str(self.checkpoint)  # type: ignore[attr-defined]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as other modules are."""
        if self._restoring is not None:
            self._restoring.remove()
            self._restoring = None

    def install_within(self, trainer: pl.Trainer, budget: Budget, *, kind: Kind | None = None) -> Ranked:
        """Install the best candidate of the last search that keeps another budget, without searching again.

        The network and a head fitted to it on the head images replace those of the trainer's module. Call it after
        `fit`, on every rank; another `fit` trains the new network, with an optimizer of its own.

        Args:
            trainer: The trainer that ran the search, with its module and data module.
            budget: The limits.
            kind: Only candidates of this kind, such as "stitched"; None: of any.

        Raises:
            StitchError: If no search has run, or the trainer has another kind of module or data.
            BudgetError: If no candidate keeps the budget; names the cheapest. Likewise if the budget limits latency
                or activation bytes and the search's did not, so that nothing was measured.
        """
        if self.result is None or self.pool is None:
            raise StitchError(
                "No search has run, so there is nothing to choose from: call trainer.fit on a module without a recipe."
            )
        place, data = self.check_run(trainer, trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
        best = self.result.within(budget, kind=kind)
        if best is None:
            cheapest = min(self.result.ranked, key=lambda ranked: ranked.candidate.cost.macs).candidate
            raise BudgetError(
                f"The search found no {'' if kind is None else f'{kind} '}network within the budget ({budget}); the "
                f"cheapest it found has {cheapest.cost} ({cheapest.recipe.path}). Raise the budget, or search under it."
            )
        with isolate_rng(), self.pool.ranks.together():
            self._fit(trainer, place, data, best.candidate, Silent())
        place.agree(trainer.strategy)
        return best

    def check_run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: Any
    ) -> tuple[Place, CalibrationDataModule]:
        """Where the network will go, and the images.

        Raises:
            StitchError: If they do not suit each other, the settings or the trainer's strategy.
        """
        check_same_namespace(trainer, "Trainer")
        find_ranking(self.search_settings.ranking, labelled=True)
        place = place_for_network(pl_module, self.attribute, self.head_attribute)
        if not isinstance(data, CalibrationDataModule):
            raise StitchError(
                f"FragmentSearch needs a CalibrationDataModule, trainer.fit(model, datamodule=...); found "
                f"{'none' if data is None else type(data).__name__}. CalibrationDataModule(datamodule=yours) wraps "
                f"another one."
            )
        if trainer.strategy.restore_checkpoint_after_setup and place.recipe is None:
            raise StitchError(
                f"{type(trainer.strategy).__name__} builds optimizers before checkpoints are restored, so the network "
                f"must be known from the start: search with another strategy first, then give "
                f"StitchedClassifier(recipe=...) or StitchedBackbone(recipe=...)."
            )
        place.check(data, ranking=self.search_settings.ranking, compare=self.compare)
        staged = isinstance(place.module, StitchedClassifier) and place.head_settings.name == "ridge"
        if self.search_settings.limits.mean_macs is not None and not staged:
            raise StitchError(
                "Budget(mean_macs=...) asks for a network that stops when its heads are sure: it takes a "
                "StitchedClassifier with head='ridge'. Limit max_macs instead."
            )
        return place, data

    def settings_until(self, until: str) -> CalibrationSettings:
        """How its pool is cut and calibrated, for networks that end `until` (`CalibrationSettings`)."""
        return replace(self.calibration_settings, until=until)

    def _search(
        self,
        trainer: pl.Trainer,
        place: Place,
        data: CalibrationDataModule,
        sources: list[Source],
        ranks: Ranks,
        progress: Progress,
    ) -> SearchResult:
        head = place.head_settings
        settings_of_pool = without_strangers(self.settings_until(head.until), [source.name for source in sources])
        if self.chooses_readout:
            settings_of_pool = replace(settings_of_pool, readout=place.readout)
        with ranks.together():
            result = self._find(trainer, place, data, sources, settings_of_pool, ranks, progress)
        place.agree(trainer.strategy)
        if self.compare and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert self.pool is not None
            with ranks.together():
                self.comparison = compare(
                    self.pool,
                    result,
                    data.labelled_dataloader(*_parts_for_head(trainer)),
                    data.test_dataloader(),
                    num_classes=head.num_classes,
                    head=head,
                    fractions=self.fractions,
                    budget=self.search_settings.limits,
                    margin=self.margin,
                    includes_selection=trainer.max_epochs == 0,
                    progress=progress,
                )
        return result

    def _find(
        self,
        trainer: pl.Trainer,
        place: Place,
        data: CalibrationDataModule,
        sources: list[Source],
        settings_of_pool: CalibrationSettings,
        ranks: Ranks,
        progress: Progress,
    ) -> SearchResult:
        """Search, and fit the head of what is chosen."""
        head = place.head_settings
        self.pool = pool = Pool(
            sources, data.image_shape, settings=settings_of_pool, device=trainer.strategy.root_device
        )
        pool.ranks = ranks
        if head.until == "output":
            # A class map of classes that the sources do not have is refused before they run.
            head.empty(pool.parts[0].graph.output_features())
        selection = _batches(trainer, data.labelled_dataloader("train", "selection"))
        if self.search_settings.ranking == "auto" and not head.needs_targets:
            selection = WithoutLabels(selection)
        settings = self.search_settings
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            settings = replace(settings, journal=None, max_candidates=2, max_healed=2)
        elif settings.journal is not None and trainer.world_size > 1:
            settings = replace(settings, journal=Path(settings.journal) / f"rank_{trainer.global_rank}")
        self.result = result = pool.search(
            _batches(trainer, data.calibration_dataloader()),
            selection,
            settings,
            num_classes=data.num_classes,
            progress=progress,
        )
        self._fit(trainer, place, data, result.best.candidate, progress)
        if place.train_mode and trainer.max_epochs != 0:
            _warn_of_train_mode(pool, result.best.candidate)
        return result

    def _fit(
        self, trainer: pl.Trainer, place: Place, data: CalibrationDataModule, candidate: Candidate, progress: Progress
    ) -> None:
        """Fit a candidate's head and give both to the module."""
        assert self.pool is not None
        progress.start("head", None)
        batches = _batches(trainer, data.labelled_dataloader(*_parts_for_head(trainer)))
        if self.attribute is None and not place.head_settings.needs_targets:
            batches = list(islice(batches, 1))  # enough to see how wide the features are
        outcomes, targets = self.pool.outcomes([candidate], batches, progress=progress)
        with torch.inference_mode(False):
            network = self.pool.assemble(candidate)
        place.install(network, outcomes[0].features, targets, data, batches)


def _warn_of_train_mode(pool: Pool, candidate: Candidate) -> None:
    """Warn of sources that do something else in train mode, where a network of their fragments is trained in it."""
    names = {fragment.source for fragment in candidate.recipe.fragments}
    for part in pool.parts:
        difference = part.graph.train_mode_difference() if part.name in names else None
        if difference is not None:
            warnings.warn(
                f"Source {part.name!r} does something else in train mode than in eval mode: {difference}. Its "
                f"fragments run eval mode's operations in train mode, too. Let a small module of its own ask for "
                f"`training`, or register it with timm.layers.register_notrace_module: modules that are kept whole "
                f"follow train() and eval().",
                stacklevel=2,
            )


def _ranks_of(trainer: pl.Trainer) -> Ranks:
    """Who shares the passes: the ranks of a strategy that has set up `torch.distributed`, else this process alone."""
    if trainer.world_size > 1 and distributed.is_available() and distributed.is_initialized():
        return DistributedRanks(trainer.strategy.root_device)
    return ALONE


def _parts_for_head(trainer: pl.Trainer) -> tuple[str, ...]:
    """The sets that a head is fitted on: all that have labels, but for the one that validates training to come."""
    return ("train", "calibration") if trainer.max_epochs != 0 else ("train", "selection", "calibration")


def _batches(trainer: pl.Trainer, loader: Any) -> Any:
    """A loader, or under `fast_dev_run` its first batch."""
    return list(islice(loader, 1)) if trainer.fast_dev_run else loader  # type: ignore[attr-defined]
