"""StitchedClassifier: a stitched network with a head, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.heads import RidgeHead
from lightning_stitch.network import StitchedNetwork
from lightning_stitch.recipe import Recipe

OptimizerCallable = Callable[[Iterable], Optimizer]


def _adamw(parameters: Iterable) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


class StitchedClassifier(pl.LightningModule):
    """A classifier on a stitched network.

    It begins without a network. `FragmentSearch` installs one, with a head fitted in closed form, before the Trainer
    builds optimizers; `Trainer(max_epochs=0)` stops there. The recipe is a hyper-parameter, so that checkpoints
    load with no callback, no sources and `weights_only=True`.

    Images are float, (batch, channels, height, width), in [0, 1], not normalised: the network does that. The network
    stays in eval mode while it is trained on, so that BatchNorm statistics do not move; `network.train()` changes that.

    Args:
        num_classes: Number of classes.
        recipe: A recipe's `to_dict()`: the structure to build, with random weights, for checkpoints. None: none yet.
        optimizer: Makes the optimizer from the parameters, should training follow; None: AdamW with lr 1e-4.
        trust_factory: Allow a recipe to import and call the factory of a "python:" source.

    Raises:
        RecipeError: If a recipe is malformed.
    """

    def __init__(
        self,
        num_classes: int,
        recipe: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        trust_factory: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        if recipe is not None:
            Recipe.from_dict(recipe)
        self.num_classes = num_classes
        self.optimizer = optimizer or _adamw
        self.trust_factory = trust_factory
        self.network: StitchedNetwork | None = None
        self.head: nn.Module | None = None
        metrics = MetricCollection(
            {"accuracy": MulticlassAccuracy(num_classes, average="micro"), "auroc": MulticlassAUROC(num_classes)}
        )
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    # -- the network -------------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe | None:
        """The structure of the network; None: there is none yet."""
        plain = self.hparams["recipe"]
        return None if plain is None else Recipe.from_dict(plain)

    def install(self, network: StitchedNetwork, head: nn.Module) -> None:
        """Take a network and a head (features -> logits), and note the recipe among the hyper-parameters."""
        self.network = network
        self.head = head
        self.hparams["recipe"] = network.recipe.to_dict()

    def prepare_data(self) -> None:
        """Let the search fetch its sources, once for each node, where waiting has no time limit."""
        for callback in getattr(self.trainer, "callbacks", []):
            fetch = getattr(callback, "fetch_sources", None)
            if fetch is not None and self.recipe is None:
                fetch()

    def configure_model(self) -> None:
        """Build the recipe's structure where there is a recipe and no network yet; does nothing the second time."""
        recipe = self.recipe
        if recipe is not None and (self.network is None or self.network.recipe != recipe):
            network = StitchedNetwork.from_recipe(recipe, trust_factory=self.trust_factory)
            self.install(network, RidgeHead(network.num_features, self.num_classes))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the network where the checkpoint holds another one, before its weights are loaded."""
        plain = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("recipe")
        if plain is None:
            raise RecipeError("This checkpoint holds no recipe: it was saved before a network was installed.")
        if plain != self.hparams["recipe"] or self.network is None:
            self.hparams["recipe"] = plain
            self.network = None
            self.configure_model()
            assert self.network is not None
            assert self.head is not None
            self.network.to(self.device)
            self.head.to(self.device)

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a data module of the other Lightning package."""
        if self.trainer.datamodule is not None:  # type: ignore[attr-defined]
            check_same_namespace(self.trainer.datamodule, "data module")  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) for images in [0, 1]."""
        if self.network is None or self.head is None:
            raise StitchError(_NO_NETWORK)
        logits: Tensor = self.head(self.network(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and AUROC."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and AUROC."""
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: Tensor | tuple[Tensor, ...] | list[Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (batch, classes)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=-1)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over all parameters."""
        if self.network is None:
            raise StitchError(_NO_NETWORK)
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits.softmax(dim=-1), labels)
        self.log(f"{stage}_loss", functional.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels))
        self.log_dict(metrics, batch_size=len(labels))


_NO_NETWORK = (
    "This StitchedClassifier has no network yet. Put a FragmentSearch among the Trainer's callbacks and call fit, load "
    "a checkpoint, or give a recipe."
)
