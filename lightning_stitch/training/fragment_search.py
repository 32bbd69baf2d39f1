"""FragmentSearch: run the fragment search before fitting, inside the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_stitch._lightning import check_parts, check_same_namespace, isolate_rng, pl, warn_where_both_are_loaded
from lightning_stitch.composing import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import BudgetError, StitchError
from lightning_stitch.progress import Bar, Progress, Silent
from lightning_stitch.report import Comparison, compare
from lightning_stitch.search import Beam, Ranked, SearchResult, Strategy, find_ranking
from lightning_stitch.settings import CalibrationSettings, Estimator, Keeping
from lightning_stitch.sources import (
    Source,
    find_sources,
    fitting_sources,
    load_sources,
    usable_sources,
    without_strangers,
)
from lightning_stitch.stitching import Candidate, Kind
from lightning_stitch.training.callback_order import check_order
from lightning_stitch.training.head_fitting import check_outputs, check_targets, fitted_head, selection_for
from lightning_stitch.training.module import StitchedClassifier
from lightning_stitch.training.resuming import is_resumed
from lightning_stitch.training.search_report import report_search
from lightning_stitch.training.slots import BackboneSlot, agree, is_restored, one_rank_first, place_for_network


class FragmentSearch(pl.Callback):
    """Composes a network from sources before fitting and installs it, with a closed-form head, in the module.

    It runs in `setup` of the fit stage, where the data are ready and optimizers are not yet built, and only if the
    module has no recipe. With `Trainer(max_epochs=0)` that is all: no back-propagation. Every rank runs the same seeded
    search; rank zero's recipe decides. Every candidate with its costs and scores goes into candidates.csv in the log
    directory; `install_within` takes another of them afterwards.

    The module is a `StitchedClassifier`, or any LightningModule with the `attribute` that its backbone is in; the data
    module is a `CalibrationDataModule`. A run that resumes from a checkpoint takes the network from there.

    Args:
        sources: What to compose from: source specs (see `load_source`), or mappings with "spec" and its arguments.
        strategy: The search; None: `Beam()`. `DepthFirst(...)` is the paper's.
        budget: Limits that the chosen network keeps: on parameters, MACs, milliseconds, bytes of activations and score.
        granularity: Which cuts are offered: "stages", "blocks", "reference", "all", a list of cut names, or a mapping
            from a source's name to one of these.
        estimator: Of CKA: "debiased", or "biased" as in the paper.
        rows_per_image: Most rows that are sampled of one image at one cut.
        ridge: Relative strength of the stitches' fit; 0 is the paper's.
        bias: Whether stitches have a bias; False is the paper's.
        ranking: How to rank on the selection images. By labels: "loo_soft_r2" or "loo_r2"; without: "consensus"
            or "cka_product"; or a function. "auto": the first of those by labels, or of those without where the
            module's head ("class_map", "none") is fitted without.
        max_candidates: Most StitchNets that are ranked.
        exits: Whether sources that end early, at one of their cuts, are candidates too (`Pool.search`).
        refinements: What to try on each network, and keep where it explains more on held-out calibration images: other
            fits of its stitches ("open_loop", "row_weights"), its "batch_norm" statistics, and "healing" of the layers
            behind its stitches (`Pool.search`).
        max_healed: Most StitchNets that are healed.
        compare: For classes only: also evaluate all sources, their self-stitched forms and the best StitchNets on the
            test images, print the table and write comparison.csv and comparison.json in the log directory. The test
            images choose nothing.
        fractions: Shares of the smallest source's MACs under which the comparison shows the best StitchNet and
            the best early exit.
        seed: Of the sampled positions.
        keep_activations: Where activations of the calibration images wait while the search lasts: on "disk" (an unnamed
            temporary file; TMPDIR says where), or in "memory".
        time_limit: Seconds of the search after which it composes no more; ranking what there is comes on top. On every
            rank alike.
        journal: A directory where the search remembers what it found and its calibration, so that a run that was
            stopped by whatever means, a killed process too, goes on where it was when it is started again. Of several
            ranks each has a directory of its own in it. A fast_dev_run leaves it alone.
        attribute: Where in a LightningModule of your own the network goes, as "backbone" or "model.encoder". What is
            there gives vectors (batch, width) for images: a `StitchedBackbone`, or any network, which is replaced by
            one whose features are mapped, by least squares on the head images, onto what it gave. A module with a
            method `on_backbone_stitched(self, backbone)` is told instead, and nothing is mapped. None: the module is a
            `StitchedClassifier`.
        head_attribute: Where in such a module the linear layer from these vectors to the classes is, to be fitted in
            closed form; None: the module's head is left as it is.
        skip_rejected: Whether to go on without sources that the check before any download rejects (`preflight`). By
            default that is an error, which shows the table.

    Ctrl-C while it composes ends the composing, not the run: the best network by then is installed, the summary says
    so, and fitting goes on. At any other time, while it ranks too, Ctrl-C ends the run as everywhere in Lightning.

    Attributes:
        pool: The sources, cut, that the search composed from; None before it ran.
        result: What the search found; None before it ran.
        comparison: The table, if asked for.
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
        refinements: Sequence[str] = (),
        max_healed: int = 16,
        compare: bool = False,
        fractions: Sequence[float] = (0.75, 0.5, 1 / 3),
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
        self.strategy = strategy
        self.budget = budget
        self.granularity = granularity
        self.estimator = estimator
        self.rows_per_image = rows_per_image
        self.ridge = ridge
        self.bias = bias
        self.ranking = ranking
        self.max_candidates = max_candidates
        self.exits = exits
        self.refinements = tuple(refinements)
        self.max_healed = max_healed
        self.compare = compare
        self.fractions = tuple(fractions)
        self.seed = seed
        self.keep_activations = keep_activations
        self.pool: Pool | None = None
        self.time_limit = time_limit
        self.journal = journal
        self.attribute = attribute
        self.head_attribute = head_attribute
        self.skip_rejected = skip_rejected
        self.result: SearchResult | None = None
        self.comparison: Comparison | None = None
        self._fetched: list[Source] | None = None
        self._usable: list[Any] | None = None

    def fetch_sources(self) -> None:
        """Load the sources, from the hub if need be; those only that passed, where they have been checked."""
        if self._fetched is None:
            self._fetched = load_sources(self.sources if self._usable is None else self._usable)

    def check_sources(
        self, image_shape: Callable[[], tuple[int, int, int] | None], *, until: str, show: bool
    ) -> list[Any]:
        """Those of the sources that can be used, checked before their weights are fetched; prints the table if asked.

        Raises:
            SourceError: If one is rejected (and `skip_rejected` is False), or they cannot be used together.
        """
        settings, skip = self.settings(until), self.skip_rejected
        self._usable = usable_sources(self.sources, image_shape, settings, skip_rejected=skip, show=show)
        return self._usable

    def _place(self, trainer: pl.Trainer) -> StitchedClassifier | BackboneSlot | None:
        """Where this run will put a network; None: it will not search, or has its sources."""
        if self._fetched is not None or trainer.state.fn != "fit":
            return None
        check_order(trainer, self)
        module = place_for_network(trainer.lightning_module, self.attribute, self.head_attribute)
        return None if module.recipe is not None or is_resumed(trainer) else module

    def look_up_sources(self, trainer: pl.Trainer) -> None:
        """Refuse sources that cannot be found, before images are downloaded; likewise."""
        if not self.skip_rejected and self._place(trainer) is not None:
            find_sources(self.sources)

    def prepare_sources(self, trainer: pl.Trainer) -> None:
        """Check and load the sources if this run will search; `prepare_data` calls it, once for each node."""
        module = self._place(trainer)
        if module is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]

        def image_shape() -> tuple[int, int, int] | None:
            if isinstance(data, CalibrationDataModule) and data.is_wrapper and trainer.world_size > 1:
                return None  # its setup may wait for ranks that are not here
            return self.check_run(trainer, trainer.lightning_module, data)[1].image_shape

        self._prepare(trainer, module.head_settings.until, image_shape)

    def _prepare(self, trainer: pl.Trainer, until: str, image_shape: Callable[[], tuple[int, int, int] | None]) -> None:
        # The other ranks of a node find its files in the cache, but must leave the same sources out.
        if self._fetched is None and (trainer.local_rank == 0 or self.skip_rejected):
            show = trainer.progress_bar_callback is not None and trainer.is_global_zero
            self.check_sources(image_shape, until=until, show=show)
        self.fetch_sources()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Search, install the network and its head, and compare if asked to."""
        if stage != "fit":
            if self.attribute is not None:
                is_restored(trainer, place_for_network(pl_module, self.attribute))
            return
        module, data = self.check_run(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        check_order(trainer, self)
        if module.recipe is not None or is_restored(trainer, module):
            return
        module.check_stage(stage)
        with one_rank_first(trainer, module):
            self._prepare(trainer, module.head_settings.until, lambda: data.image_shape)
        assert self._fetched is not None
        settings, skip = self.settings(module.head_settings.until), self.skip_rejected
        self._fetched = fitting_sources(self._fetched, data.image_shape, settings, skip_rejected=skip)
        bar = trainer.progress_bar_callback
        quiet = bar is None or not trainer.is_global_zero
        with isolate_rng(), Bar() if not quiet else Silent() as progress:
            self._run(trainer, module, data, self._fetched, progress)
        self._fetched = None
        self._report(trainer)

    def install_within(self, trainer: pl.Trainer, budget: Budget, *, kind: Kind | None = None) -> Ranked:
        """Install the best candidate of the last search that keeps another budget, without searching again.

        The network and a head fitted to it on the head images replace those of the trainer's module. Call it after
        `fit`, on every rank; another `fit` trains the new network, with an optimizer of its own.

        Args:
            trainer: The trainer that ran the search, with its module and data module.
            budget: The limits.
            kind: Only candidates of this kind, such as "stitched"; None: of any.

        Returns:
            The candidate, with its scores on the selection images.

        Raises:
            StitchError: If no search has run, or the trainer has another kind of module or data.
            BudgetError: If no candidate keeps the budget; names the cheapest. Likewise if the budget limits latency
                or activation bytes and the search's did not, so that nothing was measured.
        """
        if self.result is None or self.pool is None:
            raise StitchError(
                "No search has run, so there is nothing to choose from: call trainer.fit on a module without a recipe."
            )
        module, data = self.check_run(trainer, trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
        chosen = self.result.within(budget, kind=kind)
        if chosen is None:
            cheapest = min(self.result.ranked, key=lambda r: r.candidate.cost.macs).candidate
            wanted = "network" if kind is None else f"{kind} network"
            raise BudgetError(
                f"The search found no {wanted} within the budget ({budget}); the cheapest it found has {cheapest.cost} "
                f"({cheapest.recipe.path}). Raise the budget, or search under it."
            )
        with isolate_rng():
            self._install(trainer, module, data, chosen.candidate, Silent())
        return chosen

    def check_run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: Any
    ) -> tuple[StitchedClassifier | BackboneSlot, CalibrationDataModule]:
        """Where the network will go, and the images, once they suit each other and the search's own settings.

        Raises:
            StitchError: If they do not.
        """
        check_parts(trainer)
        check_same_namespace(pl_module, "module")
        find_ranking(self.ranking, labelled=True)
        module = place_for_network(pl_module, self.attribute, self.head_attribute)
        if not isinstance(data, CalibrationDataModule):
            found = "none" if data is None else type(data).__name__
            raise StitchError(
                f"FragmentSearch needs a CalibrationDataModule, trainer.fit(model, datamodule=...); found {found}. "
                f"CalibrationDataModule(datamodule=yours) wraps another one."
            )
        if trainer.strategy.restore_checkpoint_after_setup and module.recipe is None:
            raise StitchError(
                f"{type(trainer.strategy).__name__} builds optimizers before checkpoints are restored, so the network "
                f"must be known from the start: search with another strategy first, then give "
                f"StitchedClassifier(recipe=...) or StitchedBackbone(recipe=...)."
            )
        if isinstance(module, BackboneSlot):
            module.check_head(data)
        check_targets(module.head_settings, data, ranking=self.ranking, compare=self.compare)
        if isinstance(module, StitchedClassifier):
            module.check_class_names(data.class_names)
        return module, data

    def settings(self, until: str) -> CalibrationSettings:
        """How its pool is cut and calibrated, for networks that end `until` (`CalibrationSettings`)."""
        return CalibrationSettings(
            granularity=self.granularity,
            estimator=self.estimator,
            rows_per_image=self.rows_per_image,
            seed=self.seed,
            keep_activations=self.keep_activations,
            until=until,
        )

    def _run(
        self,
        trainer: pl.Trainer,
        module: StitchedClassifier | BackboneSlot,
        data: CalibrationDataModule,
        sources: list[Source],
        progress: Progress,
    ) -> None:
        tiny = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        self.pool = pool = Pool(
            sources,
            data.image_shape,
            settings=without_strangers(self.settings(module.head_settings.until), [part.name for part in sources]),
            device=trainer.strategy.root_device,
        )
        check_outputs(module.head_settings, pool)
        self.result = pool.search(
            _batches(trainer, data.calibration_dataloader()),
            selection_for(module.head_settings, _batches(trainer, data.selection_dataloader()), self.ranking),
            strategy=self.strategy or Beam(),
            budget=self.budget,
            ranking=self.ranking,
            num_classes=data.num_classes,
            ridge=self.ridge,
            bias=self.bias,
            max_candidates=2 if tiny else self.max_candidates,
            exits=self.exits,
            refinements=self.refinements,
            time_limit=self.time_limit,
            journal=None if tiny else self._journal(trainer),
            max_healed=2 if tiny else self.max_healed,
            progress=progress,
        )
        self._install(trainer, module, data, self.result.best.candidate, progress)
        if self.compare and not tiny:
            data.setup("test")
            self.comparison = compare(
                pool,
                self.result,
                data.head_dataloader(),
                data.test_dataloader(),
                num_classes=module.head_settings.num_classes,
                head=module.head_settings,
                fractions=self.fractions,
                progress=progress,
            )

    def _install(
        self,
        trainer: pl.Trainer,
        module: StitchedClassifier | BackboneSlot,
        data: CalibrationDataModule,
        candidate: Candidate,
        progress: Progress,
    ) -> None:
        """Fit a candidate's head and give both to the module, the same on every rank."""
        assert self.pool is not None
        progress.start("head", None)
        batches = _batches(trainer, data.head_dataloader())
        if isinstance(module, BackboneSlot):
            outcomes, targets = self.pool.outcomes([candidate], batches, progress=progress)
            with torch.inference_mode(False):
                network = self.pool.assemble(candidate)
            module.install(network, outcomes[0].features, targets, batches, data, ridge=self.ridge)
            module.agree(trainer)
            return
        head = fitted_head(module.head_settings, self.pool, candidate, batches, progress)
        with torch.inference_mode(False):
            network = self.pool.assemble(candidate)
        module.install(network.to(module.device), head.to(module.device))
        if module.class_names is None and module.head_settings.name != "none":
            module.class_names = data.class_names
        agree(trainer, module)

    def _journal(self, trainer: pl.Trainer) -> Path | None:
        if self.journal is None:
            return None
        ranks = trainer.world_size
        return Path(self.journal) / f"rank_{trainer.global_rank}" if ranks > 1 else Path(self.journal)

    def _report(self, trainer: pl.Trainer) -> None:
        assert self.result is not None
        settings = {
            "sources": [str(source) for source in self.sources],
            "granularity": self.granularity,
            "estimator": self.estimator,
            "ranking": self.ranking,
            "exits": self.exits,
            "refinements": list(self.refinements),
        }
        report_search(trainer, self.result, self.comparison, settings)


def _batches(trainer: pl.Trainer, loader: Any) -> Any:
    """A loader, or under `fast_dev_run` its first batch."""
    return list(islice(loader, 1)) if trainer.fast_dev_run else loader  # type: ignore[attr-defined]
