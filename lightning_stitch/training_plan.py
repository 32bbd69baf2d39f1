"""The training of a StitchedClassifier: its thaw schedule, learning rates and buffers, between Lightning's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_stitch.errors import StitchError
from lightning_stitch.thawing import KeptBuffers, checked_schedule, parameter_groups, thaw


class Trained(Protocol):
    """What a plan needs of a LightningModule."""

    network: Any
    head: Any
    lr: float | None
    optimizer: Any

    @property
    def trainer(self) -> Any:
        """Its Trainer."""

    @property
    def current_epoch(self) -> int:
        """The Trainer's epoch."""

    def parameters(self) -> Any:
        """Its parameters."""


class TrainingPlan:
    """What trains when, and how fast.

    Lightning's `BaseFinetuning` adds groups of parameters to the optimizer as it thaws them, and stops at parameters;
    here all groups are there from the start, so that a checkpoint of any epoch fits, and buffers are kept, too.

    Args:
        thaw: As `StitchedClassifier` has it.
        train_mode: Likewise.
        backbone_lr_factor: Likewise.
        fragment_lr_decay: Likewise.

    Raises:
        StitchError: If `thaw` names no such layers.
    """

    def __init__(
        self,
        thaw: str | Mapping[int, str],
        *,
        train_mode: bool,
        backbone_lr_factor: float,
        fragment_lr_decay: float,
    ) -> None:
        self.schedule = checked_schedule(thaw)
        self.train_mode = train_mode
        self.backbone_lr_factor = backbone_lr_factor
        self.fragment_lr_decay = fragment_lr_decay
        self._kept: KeptBuffers | None = None
        self._lr: float | None = None

    def thaw(self, module: Trained, *, epoch: int) -> bool:
        """Freeze and thaw as an epoch asks for; says whether that changed anything."""
        stage = next(stage for first, stage in reversed(self.schedule.items()) if first <= epoch)
        return thaw(module.network, module.head, stage, train_mode=self.train_mode)

    def optimizer(self, module: Trained) -> Optimizer:
        """The module's optimizer, every group's learning rate multiplied by its factor."""
        groups = parameter_groups(
            module.network,
            module.head,
            backbone_lr_factor=self.backbone_lr_factor,
            fragment_lr_decay=self.fragment_lr_decay,
        )
        if module.lr is not None:
            groups = [{**group, "lr": module.lr} for group in groups]
        self._lr = module.lr
        optimizer: Optimizer = module.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        return optimizer

    def spread_learning_rate(self, module: Trained) -> None:
        """Where a finder has set `module.lr` since the optimizer was made, multiply it by each group's factor."""
        if module.lr is None or module.lr == self._lr:
            return
        self._lr = module.lr
        for optimizer in module.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = module.lr * group.get("lr_factor", 1.0)

    def start(self, module: Trained) -> None:
        """Begin: a run that goes on in the middle of an epoch begins none."""
        self._kept = None
        self.start_epoch(module)

    def start_epoch(self, module: Trained) -> None:
        """Put back buffers that were to stay, freeze and thaw, and note the buffers that are to stay from now on.

        Raises:
            StitchError: If nothing is left to train.
        """
        if self._kept is not None:
            self._kept.put_back(module.network)
        strategy = module.trainer.strategy
        if self.thaw(module, epoch=module.current_epoch) and isinstance(strategy.model, DistributedDataParallel):
            # It exchanges the gradients of those parameters alone that had them when it was made.
            strategy.model = module
            strategy.configure_ddp()
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise StitchError(
                f"Nothing is left to train: thaw is {self.schedule}, and this head has no parameters. Thaw more, or "
                f"set max_epochs=0."
            )
        self._kept = KeptBuffers(module.network)
