from __future__ import annotations

import itertools
import pickle
from functools import partialmethod

import jsonargparse
import numpy as np
import pytest
import torch
from doubles.data import Normalising, Pairs, drawn, loader_of, numbered, write_folder
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Subset, TensorDataset

from lightning_stitch._lightning import pl
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.labels import read_targets
from lightning_stitch.data.origins import find_origins
from lightning_stitch.data.target_values import TargetReader, TargetReaders

PARTS = ("calibration", "train", "selection", "test")


@pytest.mark.parametrize("calibration", [4, 32])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_one_pool_is_split_into_four_disjoint_parts_that_cover_it(calibration, num_classes):
    module = CalibrationDataModule(numbered(200, num_classes), calibration_samples=calibration)
    parts = [drawn(module, part)[0] for part in PARTS]
    assert sorted(itertools.chain(*parts)) == list(range(200))
    rest = 200 - calibration
    share = round(0.2 * rest)
    assert module.summary == dict(zip(PARTS, (calibration, rest - 2 * share, share, share), strict=True))


def test_every_image_keeps_its_own_label():
    labels = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(3))
    module = CalibrationDataModule(numbered(90, labels=labels), calibration_samples=10)
    for part in PARTS:
        indices, found = drawn(module, part)
        assert torch.equal(found, labels[indices])


@pytest.mark.parametrize("part", ["train", "selection", "test"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_labelled_parts_keep_the_class_proportions(part, share):
    labels = torch.cat([torch.full((round(1000 * share),), 1), torch.zeros(1000 - round(1000 * share))]).long()
    module = CalibrationDataModule(numbered(1000, labels=labels), calibration_samples=4, test_samples=100)
    _, found = drawn(module, part)
    assert abs(int(found.sum()) - share * len(found)) <= 3


def test_calibration_is_drawn_without_looking_at_labels():
    one = CalibrationDataModule(numbered(80, 2), calibration_samples=16)
    other = CalibrationDataModule(numbered(80, labels=[0] * 40 + [1] * 40), calibration_samples=16)
    assert drawn(one, "calibration")[0] == drawn(other, "calibration")[0]


@pytest.mark.parametrize("sizes", [{"test_samples": 8, "selection_samples": 9}, {"train_samples": 6}])
def test_no_draw_takes_the_last_image_of_a_class(sizes):
    labels = [0] * 90 + [1] * 4 + [2] * 3
    module = CalibrationDataModule(numbered(97, labels=labels), calibration_samples=4, seed=2, **sizes)
    assert set(drawn(module, "train")[1].tolist()) == {0, 1, 2}


def test_numbers_and_shares_set_the_sizes():
    pool = numbered(120)
    module = CalibrationDataModule(
        pool, calibration_samples=20, train_samples=10, selection_samples=0.25, test_samples=7
    )
    assert module.summary == {"calibration": 20, "train": 10, "selection": 25, "test": 7}


def test_explicit_sets_are_used_as_they_are_unless_a_size_is_given():
    val = numbered(30, first=100)
    test = numbered(40, labels=[0] * 30 + [1] * 10, first=200)
    module = CalibrationDataModule(numbered(50), val, test, calibration_samples=8, test_samples=0.5)
    assert module.summary == {"calibration": 8, "train": 42, "selection": 30, "test": 20}
    assert drawn(module, "selection")[0] == list(range(100, 130))
    assert drawn(module, "test")[1].sum() == 5


def test_the_split_follows_the_seed_and_leaves_the_global_random_state_alone():
    def run(seed):
        module = CalibrationDataModule(numbered(100), seed=seed)
        return [drawn(module, part)[0] for part in PARTS], [x for x, _ in module.train_dataloader()]

    before = torch.get_rng_state()
    first, shuffled = run(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, shuffled_again = run(0)
    assert first == again
    assert all(torch.equal(a, b) for a, b in zip(shuffled, shuffled_again, strict=True))
    assert first != run(1)[0]


def test_the_train_loader_shuffles_anew_and_the_head_loader_does_not():
    module = CalibrationDataModule(numbered(100), batch_size=200)
    shuffled, fixed = module.train_dataloader(), module.head_dataloader()
    assert not torch.equal(next(iter(shuffled))[0], next(iter(shuffled))[0])
    assert torch.equal(next(iter(fixed))[0], next(iter(fixed))[0])
    assert set(next(iter(shuffled))[0].flatten().tolist()) == set(next(iter(fixed))[0].flatten().tolist())


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
REFERENCE = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255
PALETTE = Image.fromarray(PIXELS).quantize(16)
GREY = torch.from_numpy(PIXELS[..., 0]).float().expand(3, -1, -1) / 255


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(PIXELS), REFERENCE),
        (PALETTE, torch.from_numpy(np.array(PALETTE.convert("RGB"))).permute(2, 0, 1) / 255),
        (PIXELS, REFERENCE),
        (PIXELS[:, ::-1], REFERENCE.flip(2)),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), REFERENCE),
        (REFERENCE, REFERENCE),
        (REFERENCE.double().numpy().transpose(1, 2, 0), REFERENCE),
        (Image.fromarray(PIXELS[..., 0]), GREY),
        (PIXELS[..., 0], GREY),
        (PIXELS[..., :1], GREY),
        (torch.from_numpy(PIXELS[..., 0]), GREY),
        (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), GREY),
        ((PIXELS[..., 0].astype(">u2") * 257).astype(">u2"), GREY),
        (REFERENCE * 1.1 - 0.05, (REFERENCE * 1.1 - 0.05).clamp(0, 1)),
    ],
)
def test_every_kind_of_image_becomes_float_channels_first_in_the_unit_interval(image, expected):
    rest = [torch.full((3, 5, 7), number / 1000) for number in range(20)]
    module = CalibrationDataModule(
        Pairs(rest, [0, 1] * 10), test=Pairs([image] * 3, [0, 1, 0]), calibration_samples=4, batch_size=3
    )
    images, targets = next(iter(module.test_dataloader()))
    assert (images.dtype, targets.dtype, module.image_shape) == (torch.float32, torch.int64, (3, 5, 7))
    torch.testing.assert_close(images, expected.expand(3, -1, -1, -1).contiguous(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("image_size", [8, (8, 12), (30, 20)])
def test_images_of_any_size_are_resized_to_exactly_one(image_size):
    sizes = [(height + number, width) for number in range(10) for height, width in [(20, 31), (50, 40)]]
    ramps = [torch.linspace(0, 1, width).expand(3, height, width) for height, width in sizes]
    module = CalibrationDataModule(Pairs(ramps, [0, 0, 1, 1] * 5), calibration_samples=4, image_size=image_size)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert module.image_shape == (3, height, width)
    images, _ = next(iter(module.head_dataloader()))
    # A linear ramp stays one at pixel centres, away from the border.
    ramp = (torch.arange(width) + 0.5) / width
    assert (images - ramp).abs()[..., 2:-2].max() < 0.05


def test_antialiasing_agrees_with_pillow():
    pixels = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    rest = [np.full((3, 3, 3), number, dtype=np.uint8) for number in range(20)]
    module = CalibrationDataModule(
        Pairs(rest, [0, 1] * 10), test=Pairs([pixels], [0]), calibration_samples=4, image_size=(16, 20)
    )
    resized = np.asarray(Image.fromarray(pixels).resize((20, 16), Image.Resampling.BILINEAR)) / 255
    image = next(iter(module.test_dataloader()))[0][0]
    assert np.abs(image.permute(1, 2, 0).numpy() - resized).max() < 1.5 / 255


@pytest.mark.parametrize(("mean", "std"), [([0.4], [0.2]), ([0.1, 0.2, 0.3], [0.9, 0.5, 0.1])])
def test_mean_and_std_undo_a_normalisation(mean, std):
    images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    module = CalibrationDataModule(
        TensorDataset(normal, torch.arange(20) % 2), calibration_samples=12, test_samples=2, mean=mean, std=std
    )
    restored = {tuple(image.flatten().tolist()) for part in PARTS for x, _ in loader_of(module, part) for image in x}
    found = torch.tensor(sorted(restored))
    torch.testing.assert_close(found, torch.tensor(sorted(image.flatten().tolist() for image in images)))


def test_another_datamodule_lends_its_datasets():
    other = Normalising()
    module = CalibrationDataModule(datamodule=other, calibration_samples=10, mean=[0.4], std=[0.2])
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    assert other.calls == ["prepare_data", "fit", "test"]
    assert module.summary == {"calibration": 10, "train": 32, "selection": 8, "test": 10}
    assert sorted(itertools.chain(*(drawn(module, part)[0] for part in PARTS))) == list(range(60))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, range(1, 40)), range(20, -1, -1))])
@pytest.mark.parametrize("names", ["targets", "labels"])
def test_labels_in_an_attribute_are_read_without_decoding_images(wrap, names):
    pool = Pairs([torch.full((1, 2, 2), i / 1000) for i in range(40)], [i % 2 for i in range(40)])
    setattr(pool, names, pool.answers)
    pool = wrap(pool)
    labels = read_targets(pool, "train", TargetReaders.alike(TargetReader("multiclass"), pool))
    assert labels == [pool[i][1] for i in range(len(pool))]
    assert find_origins(pool).datasets[0].reads == 8 + len(pool)
    module = CalibrationDataModule(pool, calibration_samples=4)
    indices, drawn_labels = drawn(module, "train")
    assert drawn_labels.tolist() == [i % 2 for i in indices]


def test_labels_that_no_attribute_holds_are_read_in_one_pass():
    pool = Pairs(list(numbered(40).tensors[0]), [np.int64(0), torch.tensor(1)] * 20)
    assert read_targets(pool, "train", TargetReaders.alike(TargetReader("multiclass"), pool)) == [0, 1] * 20
    assert pool.reads == 40
    module = CalibrationDataModule(pool, calibration_samples=4)
    assert (module.num_classes, module.class_names) == (2, None)


def test_a_target_transform_applies_to_stored_labels():
    pool = Pairs(list(numbered(40).tensors[0]), [0, 1] * 20)
    pool.targets, pool.target_transform = ["cat", "dog"] * 20, ["cat", "dog"].index
    assert read_targets(pool, "train", TargetReaders.alike(TargetReader("multiclass"), pool)) == [0, 1] * 20
    assert pool.reads == 8


def test_a_folder_of_classes_is_split(tmp_path):
    module = CalibrationDataModule(image_folder=write_folder(tmp_path, {"good": 20, "bad": 20}), calibration_samples=10)
    assert (module.class_names, module.num_classes, module.image_shape) == (["bad", "good"], 2, (3, 5, 6))
    assert sum(module.summary.values()) == 40


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_folder_with_sets_of_its_own_numbers_their_classes_alike(tmp_path, val):
    write_folder(tmp_path / "train", {"a": 10, "b": 10, "c": 10})
    write_folder(tmp_path / val, {"b": 3, "c": 2})
    module = CalibrationDataModule(image_folder=str(tmp_path), calibration_samples=6, train_samples=9)
    _, labels = drawn(module, "selection")
    assert labels.tolist() == [1, 1, 1, 2, 2]
    assert module.summary == {"calibration": 6, "train": 9, "selection": 5, "test": 5}


@pytest.mark.parametrize("num_channels", [1, 3])
def test_grey_files_keep_one_channel_or_are_repeated_to_three(tmp_path, num_channels):
    root = write_folder(tmp_path, {"a": 20, "b": 20}, mode="L")
    module = CalibrationDataModule(image_folder=root, num_channels=num_channels, calibration_samples=4)
    assert module.image_shape == (num_channels, 5, 6)
    values = torch.cat([images for images, _ in module.head_dataloader()])
    assert torch.equal(values, (values * 255).round() / 255)
    assert values[:, :, 1:].max() <= 19 / 255  # the first row tells the path


def test_the_digits_of_scikit_learn():
    digits = load_digits()
    pool = Pairs(list((digits.images / 16).astype(np.float32)), digits.target)
    module = CalibrationDataModule(pool, image_size=16, calibration_samples=64)
    _, labels = (torch.cat(batches) for batches in zip(*module.test_dataloader(), strict=True))
    shares = torch.bincount(labels) / len(labels)
    torch.testing.assert_close(shares, torch.from_numpy(np.bincount(digits.target) / 1797).float(), atol=0.01, rtol=0)
    assert (module.num_classes, module.image_shape) == (10, (3, 16, 16))


class Probe(pl.LightningModule):
    """Counts the images it is shown at each stage."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 3)
        self.seen = {"train": 0, "val": 0, "test": 0, "predict": 0}

    def _step(self, stage, batch, batch_idx):
        images, targets = batch
        self.seen[stage] += len(images)
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), targets)

    training_step = partialmethod(_step, "train")
    validation_step = partialmethod(_step, "val")
    test_step = partialmethod(_step, "test")
    predict_step = partialmethod(_step, "predict")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Lightning recommends workers and a longer run; neither belongs in a test. Its own use of torch's trees is outdated.
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*lower value for log_every_n_steps.*",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
)
@pytest.mark.parametrize("borrowed", [False, True])
def test_a_trainer_runs_every_stage_on_it(borrowed):
    if borrowed:
        module = CalibrationDataModule(datamodule=Normalising(), calibration_samples=10, mean=[0.4], std=[0.2])
    else:
        module = CalibrationDataModule(numbered(60, 3), test=numbered(10, 3, first=90), calibration_samples=10)
    probe = Probe()
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, accelerator="cpu", **quiet)
    trainer.fit(probe, datamodule=module)
    trainer.test(probe, datamodule=module, verbose=False)
    trainer.predict(probe, datamodule=module)
    sizes = module.summary
    assert probe.seen == {"train": sizes["train"], "val": sizes["selection"], "test": 10, "predict": 10}


# The oldest jsonargparse supported has no other name for instantiate_classes.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_configured_from_plain_values(tmp_path):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    root = write_folder(tmp_path, {"a": 20, "b": 20})
    values = {"image_folder": root, "image_size": [8, 9], "calibration_samples": 5, "test_samples": 0.5}
    config = parser.parse_object(
        {"data": {"class_path": "lightning_stitch.data.datamodule.CalibrationDataModule", "init_args": values}}
    )
    module = parser.instantiate_classes(config).data
    assert module.image_shape == (3, 8, 9)
    assert module.summary["test"] == 18


def test_worker_processes_give_the_same_images():
    alone = CalibrationDataModule(numbered(60), calibration_samples=10)
    workers = CalibrationDataModule(numbered(60), calibration_samples=10, num_workers=1)
    assert drawn(alone, "test")[0] == drawn(workers, "test")[0]
    copy = pickle.loads(pickle.dumps(alone.test_dataloader().dataset))
    assert torch.equal(copy[0][0], alone.test_dataloader().dataset[0][0])


@pytest.mark.parametrize(("train_samples", "batch_sizes"), [(21, [5] * 4), (22, [5, 5, 5, 5, 2]), (20, [5] * 4)])
def test_an_image_that_would_be_alone_in_its_batch_is_left_out_of_an_epoch(
    train_samples: int, batch_sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    module = CalibrationDataModule(numbered(80), calibration_samples=10, train_samples=train_samples, batch_size=5)
    loader = module.train_dataloader()
    epochs = [[len(images) for images, _ in loader] for _ in range(2)]
    assert epochs == [batch_sizes] * 2
    assert ("one would be alone in the last batch" in caplog.text) == (train_samples == 21)
    seen = {float(x) for _ in range(4) for images, _ in loader for x in images[:, 0, 0, 0]}
    assert len(seen) == train_samples  # another one in each epoch
    assert sum(len(images) for images, _ in module.head_dataloader()) == train_samples


def test_batches_of_one_image_stay_where_they_are_asked_for() -> None:
    module = CalibrationDataModule(numbered(80), calibration_samples=10, train_samples=21, batch_size=1)
    assert len(list(module.train_dataloader())) == 21
