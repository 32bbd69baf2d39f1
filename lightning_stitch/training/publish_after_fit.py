"""PublishAfterFit: publish what a run composed or trained, when fit is over, from rank zero."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.errors import StitchError
from lightning_stitch.hub import (
    CardDetails,
    ExistingCard,
    HubRepository,
    Publication,
    check_destination,
    check_publishable,
    publish,
)
from lightning_stitch.progress import say
from lightning_stitch.training.fragment_search import FragmentSearch
from lightning_stitch.training.module import StitchedClassifier


class PublishAfterFit(pl.Callback):
    """Publishes the StitchedClassifier on the hub when fit is over; rank zero does it.

    Credentials and the repository are looked at before fit does anything long, licences as soon as there is a recipe,
    which is before training. A fast_dev_run publishes nothing. Weights are those at the end of fit.

    The card gets the table of a FragmentSearch among the callbacks that made one and, where `details` names a data set
    but no metrics, what the last validation logged.

    Args:
        repo_id: "ORG/NAME" on the hub; the other arguments, too, are those of `publish`.
        private: Whether a new repository is private.
        revision: The branch to publish on.
        details: What the card says; None: nothing but the search's table.
        existing_card: What is done where there is a card already.

    Attributes:
        publication: Where it is; None before, and on other ranks.

    Raises:
        StitchError: As `publish`, from the constructor, `setup`, `on_fit_start` or at the end of fit; also if the
            strategy shards weights.

    Example:
        In a configuration::

            callbacks:
              - class_path: lightning_stitch.PublishAfterFit
                init_args:
                  repo_id: me/solar
                  details: {class_path: lightning_stitch.CardDetails, init_args: {dataset: me/solar-cells}}
    """

    def __init__(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        details: CardDetails | None = None,
        existing_card: ExistingCard = "refuse",
    ) -> None:
        check_destination(repo_id, existing_card)
        self.repo_id = repo_id
        self.details = details or CardDetails()
        self._destination: Any = {"private": private, "revision": revision, "existing_card": existing_card}
        self.publication: Publication | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be published, before fit does anything long."""
        check_same_namespace(trainer, "Trainer")
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, StitchedClassifier):
            raise StitchError(
                f"PublishAfterFit publishes a StitchedClassifier; found {type(pl_module).__name__}. The network in a "
                f"module of your own can be published when fit is over: lightning_stitch.publish(network, "
                f"{self.repo_id!r})."
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            raise StitchError(
                f"{type(trainer.strategy).__name__} spreads the weights over ranks. Save a checkpoint and publish it: "
                f"lightning-stitch publish CHECKPOINT {self.repo_id}."
            )
        problem: StitchError | None = None
        if trainer.is_global_zero:
            try:
                HubRepository(self.repo_id, **self._destination).check()
            except StitchError as error:
                problem = error
        # All ranks fail where rank zero does, so that none waits for it.
        words = trainer.strategy.broadcast(None if problem is None else str(problem))
        if words is not None:
            raise problem or StitchError(words)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what may not be published, now that it is known what it is made of."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with warnings.catch_warnings():
            if not trainer.is_global_zero:
                warnings.simplefilter("ignore")  # rank zero says it
            check_publishable(pl_module, self.details)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish, on rank zero."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        details = _complete_details(self.details, trainer)
        self.publication = publish(pl_module, self.repo_id, details=details, **self._destination)
        say(f"The stitched network is published: {self.publication.url} (commit {self.publication.commit}).")


def _complete_details(details: CardDetails, trainer: pl.Trainer) -> CardDetails:
    """Add what the run found out to what the author says."""
    tables = [c.comparison for c in trainer.callbacks if isinstance(c, FragmentSearch) and c.comparison is not None]  # type: ignore[attr-defined]
    if tables and not details.rows:
        details = dataclasses.replace(details, rows=tables[0].rows, verdict=details.verdict or tables[0].words)
    logged = {
        name.removeprefix("val_"): float(value)
        for name, value in trainer.callback_metrics.items()
        # A card takes finite numbers alone; an AUROC of one class is none.
        if name.startswith("val_") and name != "val_loss" and math.isfinite(value)
    }
    if details.dataset is None or details.metrics or not logged:
        return details
    loaders: Any = trainer.val_dataloaders
    datasets: list[Any] = [
        getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list) else [loaders])
    ]
    sizes = [len(dataset) for dataset in datasets if hasattr(dataset, "__len__")]
    num_images = sum(sizes) if len(sizes) == len(datasets) else None
    return dataclasses.replace(details, metrics=logged, split="validation", num_images=num_images)
