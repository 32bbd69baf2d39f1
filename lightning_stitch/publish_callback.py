"""PublishAfterFit: publish what a run composed or trained, when fit is over, from rank zero."""

from __future__ import annotations

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.errors import StitchError
from lightning_stitch.model_card import CardDetails
from lightning_stitch.module import StitchedClassifier
from lightning_stitch.publishing import ExistingCard, Publication, check_credentials, check_repo_id, publish


class PublishAfterFit(pl.Callback):
    """Publishes the StitchedClassifier on the hub when fit is over; rank zero does it.

    The repository's name, the token and the licences are looked at before fit does anything long; licences as soon as
    there is a recipe. A fast_dev_run publishes nothing. Weights are those at the end of fit.

    Args:
        repo_id: "ORG/NAME" on the hub.
        private: As for `publish`.
        revision: As for `publish`.
        details: What the card says; None: nothing.
        existing_card: As for `publish`.

    Attributes:
        publication: Where it is; None before, and on other ranks.

    Raises:
        StitchError: In `setup` and at the end of fit as `publish`; also if the strategy shards weights.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        details: CardDetails | None = None,
        existing_card: ExistingCard = "refuse",
    ) -> None:
        check_repo_id(repo_id)
        self.repo_id = repo_id
        self.private = private
        self.revision = revision
        self.details = details
        self.existing_card: ExistingCard = existing_card
        self.publication: Publication | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be published, before fit does anything long."""
        check_same_namespace(trainer, "Trainer")
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, StitchedClassifier):
            raise StitchError(f"PublishAfterFit publishes a StitchedClassifier; found {type(pl_module).__name__}.")
        if getattr(trainer.strategy, "restore_checkpoint_after_setup", False):
            raise StitchError(
                f"{type(trainer.strategy).__name__} spreads the weights over ranks. Save a checkpoint and publish it: "
                f"lightning-stitch publish CHECKPOINT {self.repo_id}."
            )
        if trainer.is_global_zero:
            check_credentials()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish, on rank zero."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.publication = publish(
            pl_module,
            self.repo_id,
            private=self.private,
            revision=self.revision,
            details=self.details,
            existing_card=self.existing_card,
        )
        print(f"The stitched network is published: {self.publication.url} (commit {self.publication.commit}).")
