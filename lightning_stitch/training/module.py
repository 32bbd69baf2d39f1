"""StitchedClassifier: a stitched network with a head, as a LightningModule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from torchmetrics.utilities import rank_zero_warn

from lightning_stitch._lightning import warn_where_both_are_loaded
from lightning_stitch.cutting import in_eval_mode
from lightning_stitch.data import look_up_classes
from lightning_stitch.errors import BudgetError, CalibrationError, RecipeError, StitchError, require_text
from lightning_stitch.heads import HeadSettings, StagedHead, confidence, predictions
from lightning_stitch.hub import structure_of, warn_of_changes
from lightning_stitch.networks import StitchedNetwork, check_classes, is_traced
from lightning_stitch.recipe import Recipe
from lightning_stitch.stages import Stages
from lightning_stitch.stitching import images_of, is_empty
from lightning_stitch.training.finished import NO_NETWORK, Finished
from lightning_stitch.training.task_metrics import loss_of, metric_inputs, metrics_for
from lightning_stitch.training.thawing import TrainingPlan


class StitchedClassifier(Finished):
    """A classifier, a tagger or a regressor on a stitched network.

    It begins without a network. `FragmentSearch` installs one, with a head fitted in closed form, before the Trainer
    builds optimizers; `Trainer(max_epochs=0)` stops there. The recipe is a hyper-parameter, so that checkpoints
    load with no callback, no sources and `weights_only=True`.

    Images are float, (batch, channels, height, width), in [0, 1], not normalised: the network does that. Every batch is
    checked for that, in training each epoch's first. Batches are (images, targets), or to predict images alone; empty
    ones are skipped. The network stays in eval mode while it is trained on, so that BatchNorm statistics do not move;
    `train_mode` changes that for what is thawed. What is frozen keeps parameters and buffers bit for bit.

    Args:
        num_classes: Number of classes, of labels or of numbers to predict; None: that of the data or the checkpoint, of
            `class_names`, for a regression 1.
        recipe: A recipe's `to_dict()`, or an ensemble recipe's: the structure to build, with random weights, for
            checkpoints. None: none yet.
        optimizer: Makes the optimizer from the parameters, should training follow; None: AdamW with lr 1e-4.
        trust_factory: Allow a recipe to import and call the factory of a "python:" source.
        head: What reads the features, fitted in closed form: "ridge" (a linear map) or "knn" (the nearest
            labelled images vote). "class_map" needs no labels: the network ends at its last source's own classes, and
            {"name": "class_map", "classes": {"dog": "151-268", "cat": [281, 282]}} says which of them make a new one.
            "none": the module gives the features. Options as in the class map's mapping (`HeadSettings.of` lists them).
        task: "multiclass" (integers (batch,)), "multilabel" (0 and 1, (batch, labels)) or "regression" (numbers
            (batch,) or (batch, numbers)): it decides the loss, the metrics (`metrics_for`) and what is predicted.
        thaw: What trains: "head" alone; "stitches": also the layers that hold the stitches' numbers, which are layers
            of the fragments where a stitch is folded into them; "neighbours": also the nearest layers before and
            behind each stitch, with the normalisations on the way; "all"; or a schedule by epoch, as
            {0: "head", 3: "stitches", 6: "all"}.
        train_mode: Whether thawed layers run in train mode, where BatchNorm statistics move and dropout drops; a batch
            of one image, of which there are no statistics, runs in eval mode.
        lr: Learning rate; None: the optimizer's own. `LearningRateFinder` sets it.
        backbone_lr_factor: Learning rate of the fragments, relative to that of the head and the stitches.
        fragment_lr_decay: Each fragment's learning rate is that of the one behind it times this.
        class_names: Names of the classes, labels or numbers in their order; None: a class map's own, or those of the
            data module, where it knows them, from `FragmentSearch`. Checkpoints hold them.

    Attributes:
        head_settings: The head and the task, checked.

    Raises:
        RecipeError: If a recipe is malformed.
        StitchError: If the other arguments do not fit each other.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        recipe: dict[str, Any] | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        trust_factory: bool = False,
        head: str | dict[str, Any] = "ridge",
        task: str = "multiclass",
        thaw: str | dict[int, str] = "all",
        train_mode: bool = False,
        lr: float | None = None,
        backbone_lr_factor: float = 1.0,
        fragment_lr_decay: float = 1.0,
        class_names: list[str] | None = None,
    ) -> None:
        warn_where_both_are_loaded()
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        self.head_settings = HeadSettings.of(head, task=task, num_classes=num_classes, may_be_open=True)
        if recipe is not None:
            check_classes(Recipe.from_dict(recipe), self.head_settings)
        self.hparams["head"] = self.head_settings.plain
        self.optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-4)
        self.trust_factory = trust_factory
        mapped = self.head_settings.class_names
        self.class_names = class_names if class_names is not None or mapped is None else list(mapped)
        self.lr = lr
        self._plan = TrainingPlan(
            thaw, train_mode=train_mode, backbone_lr_factor=backbone_lr_factor, fragment_lr_decay=fragment_lr_decay
        )
        self._class_numbers: Tensor | None = None  # by the labels of the data at hand
        self.network: StitchedNetwork | None = None
        self._fused: list[StitchedNetwork] = []  # in a list, so that it is no part of the module
        self.head: nn.Module | None = None
        self._make_metrics()

    def take_classes(self, num_classes: int) -> None:
        """Take the number of classes, labels or numbers, where it was left open; else nothing happens."""
        if self.head_settings.is_open:
            self.head_settings = dataclasses.replace(self.head_settings, num_classes=num_classes)
            self.hparams["num_classes"] = num_classes
            self._make_metrics()

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or numbers; 0: there is no head, or it is not known yet."""
        return self.head_settings.num_classes

    def _make_metrics(self) -> None:
        settings = self.head_settings
        silent = settings.name == "none" or settings.is_open
        metrics = MetricCollection({}) if silent else metrics_for(settings.task, settings.num_classes)
        self.val_metrics = metrics.clone(prefix="val_").to(self.device)
        self.test_metrics = metrics.clone(prefix="test_").to(self.device)

    # -- the network -------------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe | None:
        """The structure of the network; None: there is none yet."""
        plain = self.hparams["recipe"]
        return None if plain is None else Recipe.from_dict(plain)

    @property
    def train_mode(self) -> bool:
        """Whether thawed layers run in train mode."""
        return self._plan.train_mode

    @property
    def task(self) -> str:
        """What `predict_step` gives, for those who write it down: without a head numbers, as for a regression."""
        return "regression" if self.head_settings.name == "none" else self.head_settings.task

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, labels or numbers in their order; None: they are not known."""
        names: list[str] | None = self.hparams["class_names"]
        return names

    @class_names.setter
    def class_names(self, names: list[str] | None) -> None:
        if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
            raise StitchError(f"class_names should be a list of names; found {names!r}.")
        if names is not None and (len(names) != self.num_classes or len(set(names)) < len(names)):
            raise StitchError(
                f"class_names should be {self.num_classes} different names (num_classes={self.num_classes}); found "
                f"{len(names)}: {names[:10]}."
            )
        texts = None if names is None else [str(name) for name in names]
        require_text(texts or [], "The class name")
        self.hparams["class_names"] = texts

    def install(self, network: StitchedNetwork, head: nn.Module) -> None:
        """Take a network and a head, for an ensemble `nn.Identity()`, and note the recipe as a hyper-parameter."""
        self.network = network
        self.head = head
        self.hparams["recipe"] = network.recipe.to_dict()
        self._plan.thaw(self, epoch=0)

    def at(self, *, mean_macs: float) -> StitchedClassifier:
        """Spend at most so many multiply-accumulates on an image on average, of those that its stages can be set to.

        Nothing is searched or fitted: thresholds for many means came with the network. The worst case is the same.

        Args:
            mean_macs: The most, as the labelled images had them that the heads were fitted on.

        Returns:
            This module.

        Raises:
            StitchError: If the network has no stages.
            BudgetError: If even the least is more.
        """
        recipe, stages, head = self._staged()
        fitting = [index for index, point in enumerate(stages.points) if point.mean_macs <= mean_macs]
        if not fitting:
            least = stages.points[0].mean_macs
            asked = f"{mean_macs / 1e6:.6g} M"
            raise BudgetError(
                f"This network takes at least {least / 1e6:.6g} M MACs on average; {asked} were asked for."
            )
        head.point = fitting[-1]
        point = stages.points[head.point]
        # What leave-one-out said of another setting is not of this one.
        scores = {name: value for name, value in recipe.scores.items() if "loo_" not in name}
        scores |= {**point.scores, "mean_macs": point.mean_macs}
        recipe = dataclasses.replace(recipe, stages=dataclasses.replace(stages, point=head.point), scores=scores)
        self._finished().recipe = recipe
        self.hparams["recipe"] = recipe.to_dict()
        return self

    @torch.no_grad()
    def fit_thresholds(self, batches: Iterable[Any]) -> None:
        """Set the thresholds of its stages anew, as is due when its heads were trained on.

        As many images go on as before. Images that it was trained on are surer than others are.

        Args:
            batches: Batches of images, or of (images, ...), that nothing was trained on.

        Raises:
            StitchError: If the network has no stages.
            CalibrationError: If there are no images.
        """
        recipe, _, head = self._staged()
        network, confidences = self._finished(), list[list[Tensor]]()
        with in_eval_mode(network):
            for batch in batches:
                if not is_empty(batch):
                    outputs = head.outputs(network(images_of(batch).to(self.device)))[:-1]
                    confidences.append([confidence(of_stage, head.task) for of_stage in outputs])
        if not confidences:
            raise CalibrationError("There are no images to set thresholds by.")
        head.set_thresholds(recipe, [torch.cat(of_stage) for of_stage in zip(*confidences, strict=True)])

    def _staged(self) -> tuple[Recipe, Stages, StagedHead]:
        recipe = self._finished().recipe
        if recipe.stages is None or not isinstance(self.head, StagedHead):
            raise StitchError("This network has no stages: search with Budget(mean_macs=...) for one that has.")
        return recipe, recipe.stages, self.head

    def configure_model(self) -> None:
        """Build the recipe's structure where there is a recipe and no network yet; does nothing the second time."""
        recipe = self.recipe
        if recipe is None or (self.network is not None and self.network.recipe == recipe):
            return
        network = StitchedNetwork.from_recipe(recipe, trust_factory=self.trust_factory)
        self.install(network, self.head_settings.empty_for(recipe))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the network's fragments do."""
        if self.network is not None:
            checkpoint["lightning_stitch"] = structure_of(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the network where the checkpoint holds another one, before its weights are loaded."""
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        plain = hparams.get("recipe")
        if plain is None:
            raise RecipeError("This checkpoint holds no recipe: it was saved before a network was installed.")
        settings = {"head": self.head_settings.plain, "task": self.head_settings.task}
        self.take_classes(hparams.get("num_classes") or 0)
        saved_settings = {"head": hparams.get("head", "ridge"), "task": hparams.get("task", "multiclass")}
        if saved_settings != settings:
            raise RecipeError(
                f"The checkpoint's module has {saved_settings}, this one {settings}. Make this one alike, or call "
                f"StitchedClassifier.load_from_checkpoint, which does."
            )
        if self.class_names is None:
            self.class_names = hparams.get("class_names")
        if plain != self.hparams["recipe"] or self.network is None:
            self.hparams["recipe"] = plain
            self.network = None
            self.configure_model()
            assert self.network is not None
            assert self.head is not None
            self.network.to(self.device)
            self.head.to(self.device)
        warn_of_changes(checkpoint.get("lightning_stitch"), self.network, "this checkpoint")
        self._plan.thaw(self, epoch=checkpoint.get("epoch", 0))

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse to train or evaluate without a head."""
        self.check_stage(stage)

    def check_stage(self, stage: str) -> None:
        """Refuse to train or evaluate without a head or targets; `FragmentSearch` asks before it searches."""
        trains = stage == "fit" and self.trainer.max_epochs != 0
        if not trains and stage not in ("validate", "test"):
            return
        if self.head_settings.name == "none":
            raise StitchError(
                "This StitchedClassifier has head='none': it gives features, and there is nothing to train or "
                "evaluate. Use trainer.predict, or another head; Trainer(max_epochs=0) searches without training."
            )
        if getattr(self.trainer.datamodule, "task", None) == "none":  # type: ignore[attr-defined]
            raise StitchError(_NO_TARGETS)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes or labels), numbers, or without a head features, for images in [0, 1]."""
        network = self._finished()
        assert self.head is not None
        if self._fused and self._trainer is not None and self._trainer.predicting:
            network = self._fused[0]
        if isinstance(self.head, StagedHead) and not self.training and not is_traced(images):
            return network.in_stages(images, self.head)[0]
        return self.head(network(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The task's loss of a batch (`loss_of`)."""
        if is_empty(batch):
            return None
        images, targets = self._split_batch(batch)
        if batch_idx == 0:
            self._finished().check_images(images)
        if len(images) == 1 and self.train_mode:
            rank_zero_warn("A batch of one image is trained on in eval mode: BatchNorm in train mode needs two.")
        with in_eval_mode(self._finished()) if len(images) == 1 else nullcontext():
            outputs = self._outputs_of_stages(images)
        loss = torch.stack([loss_of(self.head_settings.task, output, targets) for output in outputs]).sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of the task (`metrics_for`)."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of the task (`metrics_for`)."""
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities of classes or labels, numbers, or without a head features: (batch, any of them)."""
        network = self._finished()
        if is_empty(batch):
            return torch.empty(0, self.num_classes or network.num_features)
        images = images_of(batch)
        network.check_images(images)
        outputs = self(images)
        return outputs if self.head_settings.name == "none" else predictions(self.head_settings.task, outputs)

    def on_predict_start(self) -> None:
        """Fold what can be folded, for as long as the Trainer predicts (`StitchedNetwork.fused`)."""
        self._fused = [self._finished().fused()]

    def on_predict_end(self) -> None:
        """Let go of what was folded."""
        self._fused = []

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over all parameters, in named groups; those of frozen ones wait."""
        if self.network is None:
            raise StitchError(NO_NETWORK)
        return self._plan.make_optimizer(self)

    def on_fit_start(self) -> None:
        """Spread a learning rate that a finder has just set over the groups by their factors."""
        self._plan.spread_learning_rate(self)

    def on_train_start(self) -> None:
        """Freeze and thaw what the epoch asks for that the run begins or goes on in."""
        self._look_up_classes(self.trainer.train_dataloader)
        self._plan.start(self)

    def on_validation_start(self) -> None:
        """Look up the data's classes by name."""
        self._look_up_classes(self.trainer.val_dataloaders)

    def on_validation_end(self) -> None:
        """Go back to the numbers of the train set, where there is one."""
        self._look_up_classes(self.trainer.train_dataloader)

    def on_test_start(self) -> None:
        """Look up the data's classes by name."""
        self._look_up_classes(self.trainer.test_dataloaders)

    def _look_up_classes(self, loader: Any) -> None:
        """Compare the names of the classes with those of a dataloader's dataset."""
        loader = loader[0] if isinstance(loader, list | tuple) and len(loader) == 1 else loader
        names = self.class_names if self.task == "multiclass" else None
        self._class_numbers = look_up_classes(getattr(loader, "dataset", None), names)

    def on_train_epoch_start(self) -> None:
        """Freeze and thaw what the epoch asks for."""
        self._plan.start_epoch(self)

    def _evaluate(self, batch: Any, metrics: MetricCollection, stage: str) -> None:
        if self.trainer.sanity_checking and (self.head_settings.name == "none" or isinstance(batch, Tensor)):
            return  # fit checks a few batches even where there is no epoch to train
        if is_empty(batch):
            return
        images, targets = self._split_batch(batch)
        self._finished().check_images(images)
        outputs = self(images)
        metrics.update(*metric_inputs(self.head_settings.task, outputs, targets))
        loss = loss_of(self.head_settings.task, outputs, targets)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(images))
        if self.trainer.sanity_checking:
            metrics.reset()  # of the few images of a sanity check they would say that they are undefined
        else:
            self.log_dict(metrics, batch_size=len(images))

    def _outputs_of_stages(self, images: Tensor) -> list[Tensor]:
        """The outputs of every stage's head; where there are no stages of the one."""
        if not isinstance(self.head, StagedHead):
            return [self(images)]
        return [self.head.answer(outputs) for outputs in self.head.outputs(self._finished()(images))]

    def _split_batch(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch, which must have targets; classes as this module numbers them."""
        images = images_of(batch)
        if images is batch or len(batch) < 2:
            raise StitchError(_NO_TARGETS)
        targets = batch[1]
        return images, targets if self._class_numbers is None else self._class_numbers.to(targets.device)[targets]


_NO_TARGETS = (
    "There is nothing to train on or to evaluate: the images have no targets. Trainer(max_epochs=0) searches without "
    "training, and trainer.predict needs none."
)
