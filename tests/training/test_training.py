from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.thawed import SCHEDULE, Watch, classifier, images, trainer
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_stitch import FragmentSearch, StitchedClassifier, StitchError

HEAD = {"head.weight", "head.bias"}
STITCH = {"network.entries.1.weight", "network.entries.1.bias"}
# The batch norm in this network's neighbours of the stitch.
STATISTICS = {f"network.fragments.0.conv1.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def search_that_must_not_run() -> FragmentSearch:
    return FragmentSearch(["there is no such source"])


def weights(model: LightningModule) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items() if "metrics" not in name}


def moved(before: dict[str, Any], model: LightningModule) -> set[str]:
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


WAYS: dict[str, tuple[Callable[[Path], list[Callback]], dict[str, Any]]] = {
    "alone": (lambda folder: [], {}),
    "ModelCheckpoint": (lambda folder: [ModelCheckpoint(folder, monitor="val_loss")], {"enable_checkpointing": True}),
    "EarlyStopping": (lambda folder: [EarlyStopping("val_loss", patience=3)], {}),
    "LearningRateFinder": (lambda folder: [LearningRateFinder(num_training_steps=12)], {}),
    "BatchSizeFinder": (lambda folder: [BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=4)], {}),
    "StochasticWeightAveraging": (lambda folder: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], {}),
    "WeightAveraging": (lambda folder: [WeightAveraging()], {}),
    "gradient accumulation": (lambda folder: [], {"accumulate_grad_batches": 2}),
    "bf16-mixed": (lambda folder: [], {"precision": "bf16-mixed"}),
    "fast_dev_run": (lambda folder: [], {"fast_dev_run": True}),
    "overfit_batches": (lambda folder: [], {"overfit_batches": 2}),
    "limited batches": (lambda folder: [], {"limit_train_batches": 2, "limit_val_batches": 1}),
}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.filterwarnings("ignore:No positive samples in targets")  # in a few images
@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_keeps_every_bit_and_what_is_thawed_moves(way: str, tmp_path: Path) -> None:
    callbacks, options = WAYS[way]
    model = classifier(backbone_lr_factor=0.1)
    before = weights(model)
    trainer(tmp_path, search_that_must_not_run(), *callbacks(tmp_path), **options).fit(model, images())
    assert moved(before, model) == (HEAD if way == "fast_dev_run" else HEAD | STITCH)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_moving_average_rounds_frozen_weights_and_moves_them_no_further(tmp_path: Path) -> None:
    model = classifier(thaw="head")
    before = weights(model)
    trainer(tmp_path, EMAWeightAveraging()).fit(model, images())
    assert moved(before, model) >= HEAD
    frozen = [name for name in before if name not in HEAD]
    torch.testing.assert_close([model.state_dict()[name] for name in frozen], [before[name] for name in frozen])


@pytest.mark.parametrize(
    ("stage", "statistics"),
    [("head", 0), ("stitches", 0), ("neighbours", 3), ("all", None)],
    ids=lambda value: str(value),
)
def test_in_train_mode_the_statistics_of_thawed_layers_alone_move(
    stage: str, statistics: int | None, tmp_path: Path
) -> None:
    model = classifier(thaw=stage, train_mode=True)
    before = weights(model)
    trainer(tmp_path, max_epochs=2).fit(model, images())
    found = {name for name in moved(before, model) if "running" in name or "num_batches" in name}
    every = {name for name in before if "running" in name or "num_batches" in name}
    assert found == {0: set(), 3: STATISTICS, None: every}[statistics]


def test_a_schedule_thaws_at_its_epochs_and_can_freeze_again(tmp_path: Path) -> None:
    model, watch = classifier(thaw={0: "all", 1: "head", 3: "stitches"}), Watch()
    states = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            states.append(weights(pl_module))

    trainer(tmp_path, watch, Keep(), max_epochs=4).fit(model, images())
    every = {name for name, _ in model.named_parameters()}
    assert watch.trained == {0: every, 1: HEAD, 2: HEAD, 3: HEAD | STITCH}
    # the optimizer's momentum does not carry what is frozen again
    changes = [{n for n in old if not torch.equal(old[n], new[n])} for old, new in pairwise(states)]
    assert changes == [HEAD, HEAD, HEAD | STITCH]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_crash_and_a_resumed_run_end_as_one_that_went_through(tmp_path: Path) -> None:
    options: dict[str, Any] = {"thaw": {0: "head", 1: "neighbours", 3: "all"}, "train_mode": True, "lr": 1e-3}
    first, through = classifier(**options), Watch()
    crashed = copy.deepcopy(first)
    whole = trainer(tmp_path, through, max_epochs=4)
    whole.fit(first, images())
    last = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KeyError, match="crash"):
        trainer(tmp_path, Watch(crash_at=2), last, max_epochs=4, enable_checkpointing=True).fit(crashed, images())
    resumed, again = StitchedClassifier(num_classes=3, **options), Watch()
    search = search_that_must_not_run()
    search.ckpt_path = tmp_path / "last.ckpt"
    rest = trainer(tmp_path, search, again, max_epochs=4)
    rest.fit(resumed, images(), ckpt_path=tmp_path / "last.ckpt")
    assert again.trained == {epoch: through.trained[epoch] for epoch in (2, 3)}
    assert moved(weights(first), resumed) == set()
    groups = [
        [{key: value for key, value in group.items() if key != "params"} for group in run.optimizers[0].param_groups]
        for run in (whole, rest)
    ]
    assert groups[0] == groups[1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_within_an_epoch_trains_what_that_epoch_thaws(tmp_path: Path) -> None:
    model, steps = classifier(), ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    trainer(tmp_path, steps, max_epochs=2, enable_checkpointing=True).fit(model, images())
    resumed, watch = StitchedClassifier(num_classes=3, thaw=SCHEDULE), Watch()
    trainer(tmp_path, watch, max_epochs=2).fit(resumed, images(), ckpt_path=tmp_path / "step=8.ckpt")
    assert watch.trained == {1: HEAD | STITCH}


def test_a_checkpoint_of_one_schedule_goes_on_under_another(tmp_path: Path) -> None:
    model = classifier(thaw="head")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, images())
    run.save_checkpoint(tmp_path / "head.ckpt")
    later, watch = StitchedClassifier(num_classes=3, thaw="stitches"), Watch()
    trainer(tmp_path, watch, max_epochs=2).fit(later, images(), ckpt_path=tmp_path / "head.ckpt")
    assert watch.trained == {1: HEAD | STITCH}
    assert moved(weights(model), later) == HEAD | STITCH


def test_a_loaded_checkpoint_has_the_frozen_layers_of_its_epoch(tmp_path: Path) -> None:
    model = classifier()
    run = trainer(tmp_path, max_epochs=2)
    for epochs, expected in ((1, HEAD), (2, HEAD | STITCH)):
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(model, images())
        run.save_checkpoint(tmp_path / "model.ckpt")
        loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
        # saved behind the last epoch, so that it is the next one's
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} >= expected


@pytest.mark.parametrize("lr", [None, 0.02])
def test_each_group_has_its_name_and_its_share_of_the_learning_rate(lr: float | None, tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    model = classifier(
        lr=lr,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        backbone_lr_factor=0.1,
        fragment_lr_decay=0.5,
    )
    trainer(tmp_path, monitor, max_epochs=1, logger=CSVLogger(tmp_path)).fit(model, images())
    base = lr or 0.5
    assert {name: values[0] for name, values in monitor.lrs.items()} == {
        "lr-SGD/head": base,
        "lr-SGD/stitch_2": base,
        "lr-SGD/fragment_1": pytest.approx(0.05 * base),
        "lr-SGD/fragment_2": pytest.approx(0.1 * base),
    }


def test_a_learning_rate_that_a_finder_sets_is_spread_by_the_factors(tmp_path: Path) -> None:
    model = classifier(backbone_lr_factor=0.1)
    finder = LearningRateFinder(num_training_steps=24, early_stop_threshold=None)
    run = trainer(tmp_path, finder, max_epochs=4)
    run.fit(model, images())
    assert finder.optimal_lr is not None
    assert model.lr == finder.optimal_lr.suggestion() != 1e-3
    factors = {group["name"]: group["lr"] / model.lr for group in run.optimizers[0].param_groups}
    assert factors == {"head": 1, "stitch_2": 1, "fragment_1": pytest.approx(0.1), "fragment_2": pytest.approx(0.1)}


def test_nothing_to_train_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    model = classifier(thaw="head")
    assert model.network is not None
    model.install(model.network, nn.Linear(model.network.num_features, 3).requires_grad_(False))
    model.head = nn.AdaptiveAvgPool1d(3)
    with pytest.raises(StitchError, match=r"Nothing is left to train: thaw is \{0: 'head'\}"):
        trainer(tmp_path).fit(model, images())


@pytest.mark.parametrize(
    ("callback", "does"),
    [
        (lambda: StochasticWeightAveraging(1e-3), "copies the module"),
        (WeightAveraging, "copies the module"),
        (EMAWeightAveraging, "copies the module"),
        (BackboneFinetuning, "freezes layers"),
        (lambda: ModelPruning("l1_unstructured"), "collects parameters"),
    ],
)
def test_a_callback_that_needs_the_network_in_setup_stands_behind_the_search(
    callback: Callable[[], Callback], does: str, tmp_path: Path
) -> None:
    early = callback()
    order = rf"callbacks=\[FragmentSearch, {type(early).__name__}\]"
    with pytest.raises(StitchError, match=rf"^{type(early).__name__} stands before .*{does}.* that works is {order}"):
        trainer(tmp_path, EarlyStopping("val_loss"), early, search_that_must_not_run()).fit(
            StitchedClassifier(num_classes=3), images()
        )


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_search_and_all_callbacks_that_copy_or_save_the_module_go_together_and_resume(tmp_path: Path) -> None:
    def run(model: StitchedClassifier, sources: list[Any], epochs: int, path: Path | None = None) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        search = FragmentSearch(sources, max_candidates=2, exits=False)
        search.ckpt_path = path
        callbacks = [
            search,
            WeightAveraging(),
            LearningRateMonitor(),
            EarlyStopping("val_loss", patience=9),
            ModelCheckpoint(folder / "kept", save_last=True),
        ]
        options: dict[str, Any] = {"max_epochs": epochs, "logger": CSVLogger(folder), "enable_checkpointing": True}
        trainer(folder, *callbacks, **options).fit(model, images(), ckpt_path=path)
        return folder / "kept" / "last.ckpt"

    whole, first, second = (StitchedClassifier(num_classes=3, thaw=SCHEDULE) for _ in range(3))
    donors = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]
    run(whole, donors, 2)
    run(second, ["there is no such source"], 2, run(first, donors, 1))
    assert second.recipe == whole.recipe
    assert moved(weights(whole), second) == set()


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from doubles.thawed import Watch, classifier, images, trainer
if __name__ == "__main__":
    model, watch = classifier(thaw={0: "head", 1: "stitches", 2: "all"}), Watch()
    run = trainer(Path(sys.argv[1]), watch, max_epochs=3, strategy="ddp", devices=2)
    run.fit(model, images())
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    counts = {epoch: len(names) for epoch, names in watch.trained.items()}
    record = {"total": total, "counts": counts, "world": run.world_size}
    (Path(sys.argv[1]) / f"rank{run.global_rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
def test_what_is_thawed_later_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert first["counts"]["0"] < first["counts"]["1"] < first["counts"]["2"]
