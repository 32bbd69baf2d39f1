"""Where a search puts the network that it chose: a StitchedClassifier's own, or an attribute of another module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.composing import Pool
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.progress import Progress
from lightning_stitch.recipe import Recipe
from lightning_stitch.search import Ranking
from lightning_stitch.stitching import Candidate
from lightning_stitch.training.backbone_place import BackbonePlace
from lightning_stitch.training.data_checks import check_targets
from lightning_stitch.training.module import StitchedClassifier


class Place(Protocol):
    """A place for a network in a module.

    Attributes:
        head_settings: What candidates are ranked for, and the head that is fitted to the chosen one.
    """

    head_settings: HeadSettings

    @property
    def recipe(self) -> Recipe | None:
        """The structure of the network that is there; None: there is none yet."""

    @property
    def train_mode(self) -> bool:
        """Whether the network follows `train()` while it is trained."""

    def check(self, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
        """Refuse data that the place, the ranking or the comparison cannot use.

        Raises:
            StitchError: Saying what the data have and what was asked for.
        """

    def check_stage(self, stage: str) -> None:
        """Refuse, before a search, a stage that the module could not run after it."""

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Build the structure that a checkpoint holds.

        Raises:
            RecipeError: If it holds none for this place.
        """

    def install(
        self,
        candidate: Candidate,
        pool: Pool,
        data: CalibrationDataModule,
        batches: Any,
        *,
        ridge: float,
        bar: Progress,
    ) -> None:
        """Put a candidate's network in, and fit its head where there is one to fit.

        Args:
            candidate: The candidate.
            pool: The sources that it is made of.
            data: The data module.
            batches: The head images as `data` gives them, (images, targets).
            ridge: Relative strength of the fit of a linear layer behind the network, where the place needs one.
            bar: Where to show progress.
        """

    def agree(self, strategy: Any) -> None:
        """Take rank zero's structure, and what the strategy would not copy, on every rank.

        Args:
            strategy: The Trainer's, which broadcasts.
        """


class ClassifierPlace:
    """The network of a `StitchedClassifier`.

    Args:
        module: The classifier.
    """

    def __init__(self, module: StitchedClassifier) -> None:
        self.module = module
        self.head_settings = module.head_settings

    @property
    def recipe(self) -> Recipe | None:
        """As `Place` has it."""
        return self.module.recipe

    @property
    def train_mode(self) -> bool:
        """As `Place` has it."""
        return self.module.train_mode

    def check(self, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
        """As `Place` has it; classes must be named alike, too."""
        check_targets(self.head_settings, data, ranking=ranking, compare=compare)
        names = self.module.class_names
        if None not in (names, data.class_names) and names != data.class_names:
            raise StitchError(
                f"StitchedClassifier has class_names={names}, the data have {data.class_names}; the order is that of "
                f"the labels. Leave class_names out to take the data's."
            )

    def check_stage(self, stage: str) -> None:
        """As `StitchedClassifier.check_stage`."""
        self.module.check_stage(stage)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """As `Place` has it."""
        self.module.on_load_checkpoint(dict(checkpoint))

    def install(
        self,
        candidate: Candidate,
        pool: Pool,
        data: CalibrationDataModule,
        batches: Any,
        *,
        ridge: float,
        bar: Progress,
    ) -> None:
        """As `Place` has it; nothing stands between the network and its head, so that `ridge` is not used."""
        module = self.module
        images = batches if self.head_settings.needs_targets else [next(iter(batches))]
        outcomes, targets = pool.outcomes([candidate], images, progress=bar)
        with torch.inference_mode(False):
            head, network = self.head_settings.fit(outcomes[0].features, targets), pool.assemble(candidate)
        module.install(network.to(module.device), head.to(module.device))
        if module.class_names is None and self.head_settings.name != "none":
            module.class_names = data.class_names

    def agree(self, strategy: Any) -> None:
        """As `Place` has it."""
        module = self.module
        mine = module.hparams["recipe"]
        recipe = strategy.broadcast(mine, src=0)
        if recipe != mine:
            module.hparams["recipe"] = recipe
            if module.network is not None and {**recipe, "scores": mine["scores"]} == mine:
                # The same network, of which each rank has measured the latency itself.
                module.network.recipe = Recipe.from_dict(recipe)
            module.configure_model()
        assert module.head is not None
        # A head that holds labelled images has as many rows on every rank as rank zero's.
        numbers = {name: tensor.cpu() for name, tensor in module.head.state_dict().items()}
        module.head.load_state_dict(strategy.broadcast(numbers, src=0))


def place_for_network(module: pl.LightningModule, attribute: str | None, head_attribute: str | None = None) -> Place:
    """Where a search puts its network: a `StitchedClassifier` as a whole, or an attribute of another module.

    Raises:
        StitchError: If there is no such place.
    """
    check_same_namespace(module, "module")
    if attribute is not None:
        return BackbonePlace(module, attribute, head_attribute)
    if head_attribute is not None:
        raise StitchError(f"head_attribute={head_attribute!r} needs attribute=, which says where the backbone is.")
    if not isinstance(module, StitchedClassifier):
        raise StitchError(
            f"FragmentSearch fits a StitchedClassifier; found {type(module).__name__}. In a module of your own it "
            f"fills an attribute: FragmentSearch(attribute='backbone', ...)."
        )
    return ClassifierPlace(module)
