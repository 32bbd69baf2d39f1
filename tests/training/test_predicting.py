from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.own_modules import Classifier
from doubles.predictions import NAMES, SIZE, classifier, quiet_trainer, save_checkpoint, small_source, write_digits
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stitch import (
    CalibrationDataModule,
    CalibrationError,
    FragmentSearch,
    ImageFiles,
    PredictionWriter,
    StitchedBackbone,
    StitchedClassifier,
    StitchError,
    predict_files,
)
from lightning_stitch._lightning import pl
from lightning_stitch.data.image_files import ImageFileSet


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "train", 40)
    write_digits(folder / "test", 25, first=40)
    return folder


@pytest.fixture(scope="module")
def model() -> StitchedClassifier:
    return classifier(small_source(3))


def probabilities(rows: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([[row["probabilities"][name] for name in NAMES] for row in rows])


def test_files_are_predicted_as_in_the_data_module_of_the_search(images: Path, model: StitchedClassifier) -> None:
    data = CalibrationDataModule(image_folder=str(images), image_size=SIZE, calibration_samples=4)
    expected = torch.cat(quiet_trainer(images).predict(model, data))
    rows = predict_files(model, images / "test")
    torch.testing.assert_close(probabilities(rows), expected)
    assert [row["file"] for row in rows] == [str(file) for file in sorted((images / "test").rglob("*.png"))]
    assert [row["class"] for row in rows] == [NAMES[label] for label in expected.argmax(1)]
    assert len({row["class"] for row in rows}) > 1


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_stand_in_the_order_of_the_files(images: Path, model: StitchedClassifier, batch_size: int) -> None:
    folder = images / "test"
    files = [folder / NAMES[2], *sorted((folder / NAMES[0]).iterdir())[::-1]]
    rows = predict_files(model, files, batch_size=batch_size)
    assert [row["file"] for row in rows] == [*map(str, sorted(files[0].iterdir())), *map(str, files[1:])]
    whole = {row["file"]: row for row in predict_files(model, folder)}
    torch.testing.assert_close(probabilities(rows), probabilities([whole[row["file"]] for row in rows]))


def test_grey_and_colour_files_of_any_size_are_predicted_together(tmp_path: Path, model: StitchedClassifier) -> None:
    for mode, size, value in (("L", (9, 40), 100), ("RGB", (3, 3), (100,) * 3), ("RGBA", (50, 8), (100, 100, 100, 9))):
        Image.new(mode, size, value).save(tmp_path / f"{mode}.png")
    rows = predict_files(model, tmp_path)
    with torch.no_grad():
        expected = model.eval()(torch.full((1, 3, SIZE, SIZE), 100 / 255)).softmax(1)
    torch.testing.assert_close(probabilities(rows), expected.expand(3, -1))


def test_a_network_of_one_channel_takes_grey_files_and_refuses_colour(tmp_path: Path, images: Path) -> None:
    grey = classifier(small_source(1))
    assert len(predict_files(grey, images / "test" / NAMES[0])) == len(list((images / "test" / NAMES[0]).iterdir()))
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(CalibrationError, match="it is in colour, the network takes grey images"):
        predict_files(grey, tmp_path)


def test_predictions_are_written_as_csv_and_as_json_lines(
    tmp_path: Path, images: Path, model: StitchedClassifier
) -> None:
    rows = predict_files(model, images / "test", output=tmp_path / "p.csv")
    predict_files(model, images / "test", output=str(tmp_path / "p.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    with (tmp_path / "p.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["file", "class", "probability", *(f"probability_{name}" for name in NAMES)]
    assert [(row["file"], row["class"]) for row in read] == [(row["file"], row["class"]) for row in rows]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.csv", "p.jsonl"]


def test_an_image_that_breaks_in_the_middle_leaves_no_file(
    tmp_path: Path, images: Path, model: StitchedClassifier
) -> None:
    folder = write_digits(tmp_path / "images", 6)
    good = sorted(folder.rglob("*.png"))[-1]
    good.write_bytes(good.read_bytes()[:60])
    output = tmp_path / "out" / "p.csv"
    output.parent.mkdir()
    with pytest.raises(CalibrationError, match=f"{good.name} cannot be used"):
        predict_files(model, folder, output=output, batch_size=2)
    assert list(output.parent.iterdir()) == []
    rows = predict_files(model, folder, output=output, skip_unreadable=True)
    assert [row["file"] for row in rows] == [str(file) for file in sorted(folder.rglob("*.png"))[:-1]]


def test_a_file_that_is_there_is_replaced_only_on_demand(
    tmp_path: Path, images: Path, model: StitchedClassifier
) -> None:
    output = tmp_path / "p.csv"
    output.write_text("mine")
    with pytest.raises(StitchError, match=r"p\.csv exists; name another file"):
        predict_files(model, images / "nowhere", output=output)  # said before a file is looked at
    with pytest.raises(StitchError, match=r"p\.csv exists; name another file"):
        quiet_trainer(tmp_path, callbacks=[PredictionWriter(str(output))]).predict(model, ImageFiles(str(images)))
    assert output.read_text() == "mine"
    predict_files(model, images / "test", output=output, overwrite=True)
    assert output.read_text().startswith("file,class,")


def test_the_random_state_and_the_training_mode_are_left_alone(images: Path, model: StitchedClassifier) -> None:
    before = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        predict_files(model, images / "test" / NAMES[0])
        assert model.training is mode
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_and_devices_that_cannot_predict_are_refused(images: Path, model: StitchedClassifier) -> None:
    with pytest.raises(StitchError, match="StitchedClassifier has no recipe, so the size of its images is not known"):
        predict_files(StitchedClassifier(num_classes=3), images)
    with pytest.raises(StitchError, match="LightningModule has no recipe"):
        predict_files(pl.LightningModule(), images)
    with pytest.raises(StitchError, match=r"The device 'toaster' cannot be used: .*Available names"):
        predict_files(model, images, device="toaster")
    with pytest.raises(CalibrationError, match="does not exist"):
        predict_files(model, images / "nowhere", device="toaster")


class Own(pl.LightningModule):
    """Another module: two labels for images of any kind."""

    task = "multilabel"
    class_names = ("bright", "dark")

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        brightness = batch.flatten(1).mean(1)
        return torch.stack([brightness, 1 - brightness], 1) if self.output is None else self.output


def test_a_writer_takes_names_and_task_from_any_module_and_numbers_images_without_files(tmp_path: Path) -> None:
    images = torch.tensor([0.9, 0.2, 0.5]).view(3, 1, 1, 1)
    loader = DataLoader(images, batch_size=2, sampler=[2, 0, 1])
    writer = PredictionWriter(str(tmp_path / "p.csv"))
    quiet_trainer(tmp_path, callbacks=[writer]).predict(Own(), loader)
    assert [(row["file"], row["labels"]) for row in writer.rows] == [
        ("0", ["bright"]),
        ("1", ["dark"]),
        ("2", ["bright", "dark"]),
    ]
    assert (tmp_path / "p.csv").read_text().splitlines()[2] == "1,dark,0.2,0.8"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"task": "multilabel"}, {"file", "labels", "probabilities"}),
        ({"task": "regression"}, {"file", "values"}),
        ({"head": "none"}, {"file", "values"}),
    ],
)
def test_what_is_written_is_what_the_classifiers_task_and_head_give(
    images: Path, model: StitchedClassifier, options: dict[str, str], fields: set[str]
) -> None:
    assert model.network is not None
    assert model.head is not None
    other = StitchedClassifier(**({} if "head" in options else {"num_classes": 3}), **options)
    other.install(model.network, torch.nn.Identity() if "head" in options else model.head)
    rows = predict_files(other, images)
    assert all(row.keys() == fields for row in rows)
    numbers = rows[0].get("values") or rows[0]["probabilities"]
    image, _ = ImageFileSet([Path(rows[0]["file"])], (3, SIZE, SIZE))[0]
    with torch.no_grad():
        given = other.eval().predict_step(image[None], 0)
    assert list(numbers.values()) == pytest.approx(given[0].tolist(), abs=1e-5)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path / "p.csv"))
    run = quiet_trainer(tmp_path, callbacks=[writer], fast_dev_run=True)
    run.predict(Own(), DataLoader(torch.rand(3, 1, 1, 1), batch_size=2))
    assert len(writer.rows) == 2
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    ("output", "loaders", "words"),
    [
        ({"logits": 1}, 1, "predict_step should give a tensor, a row for each image; found a dict"),
        (torch.ones(5, 2), 1, "There are 10 predictions of 3 images"),
        (None, 2, "for one dataloader; predict_dataloader gives several"),
    ],
)
def test_predictions_that_make_no_table_are_refused(tmp_path: Path, output: Any, loaders: int, words: str) -> None:
    given = [DataLoader(torch.rand(3, 1, 1, 1), batch_size=2) for _ in range(loaders)]
    run = quiet_trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "p.csv"))])
    with pytest.raises(StitchError, match=words):
        run.predict(Own(output), given if loaders > 1 else given[0])
    assert not (tmp_path / "p.csv").exists()


def test_class_names_travel_from_the_folder_through_search_and_checkpoint(tmp_path: Path, images: Path) -> None:
    data = CalibrationDataModule(image_folder=str(images), image_size=32, calibration_samples=8)
    search = FragmentSearch([{"spec": "test_resnet", "pretrained": False}], max_candidates=1)
    found = StitchedClassifier(num_classes=3)
    run = quiet_trainer(tmp_path, callbacks=[search])
    run.fit(found, data)
    assert found.class_names == NAMES
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt").class_names == NAMES
    fresh = StitchedClassifier(num_classes=3)
    quiet_trainer(tmp_path).predict(fresh, ImageFiles(str(images / "test")), ckpt_path=tmp_path / "model.ckpt")
    assert fresh.class_names == NAMES


def test_class_names_in_another_order_than_the_datas_are_refused(tmp_path: Path, images: Path) -> None:
    data = CalibrationDataModule(image_folder=str(images), image_size=32, calibration_samples=8)
    search = FragmentSearch([{"spec": "test_resnet", "pretrained": False}])
    with pytest.raises(StitchError, match=r"has class_names=\['digit_2', .* the data have \['digit_0'"):
        quiet_trainer(tmp_path, callbacks=[search]).fit(StitchedClassifier(3, class_names=NAMES[::-1]), data)


@pytest.mark.parametrize("names", [["cat", "dog"], ["cat", "dog", "cat"]])
def test_class_names_are_as_many_as_classes_and_different(names: list[str]) -> None:
    with pytest.raises(StitchError, match=r"should be 3 different names .*found [23]: \['cat', 'dog'"):
        StitchedClassifier(num_classes=3, class_names=names)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from doubles.own_modules import Classifier
from doubles.predictions import classifier, quiet_trainer, small_source
from lightning_stitch import ImageFiles, PredictionWriter
if __name__ == "__main__":
    folder, images = Path(sys.argv[1]), sys.argv[2]
    writer = PredictionWriter(str(folder / "two.csv"))
    run = quiet_trainer(folder, callbacks=[writer], strategy="ddp", devices=2)
    run.predict(classifier(small_source(3)), ImageFiles(images, batch_size=1), return_predictions=False)
    (folder / f"rank{run.global_rank}").write_text(str(len(writer.rows)))
"""


@pytest.mark.slow
def test_two_ranks_write_the_file_that_one_writes(tmp_path: Path, images: Path, model: StitchedClassifier) -> None:
    folder = images / "test"
    script = tmp_path / "predict.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), str(folder), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    predict_files(model, folder, output=tmp_path / "one.csv", batch_size=1)
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["25", "25"]


def test_more_processes_than_images_are_refused(images: Path, model: StitchedClassifier) -> None:
    class Many:
        world_size, lightning_module = 26, model

    files = ImageFiles(str(images / "test"))
    files.trainer = Many()  # type: ignore[assignment]
    with pytest.raises(CalibrationError, match="25 images cannot be shared by 26 processes; use fewer devices"):
        files.predict_dataloader()


def test_worker_processes_read_the_same_images(images: Path, model: StitchedClassifier) -> None:
    folder = images / "test" / NAMES[1]
    assert predict_files(model, folder, num_workers=1) == predict_files(model, folder)


def test_a_checkpoint_of_a_whole_classifier_predicts_the_same(tmp_path: Path, images: Path) -> None:
    whole = classifier()
    path = save_checkpoint(whole, tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(path, weights_only=True)
    assert predict_files(loaded, images / "test") == predict_files(whole, images / "test")
    assert isinstance(loaded.head, nn.Module)


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_a_module_of_ones_own_with_a_stitched_backbone_predicts_files(
    task: str, images: Path, model: StitchedClassifier
) -> None:
    assert model.network is not None
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    backbone = StitchedBackbone(mean=mean, std=std)
    backbone.install(model.network)
    mine = Classifier()
    mine.backbone, mine.head = backbone, torch.nn.Linear(backbone.num_features, 3)
    mine.class_names, mine.task = NAMES, task
    rows = predict_files(mine.train(), images / "test" / NAMES[0])
    assert mine.training
    files = ImageFileSet([Path(row["file"]) for row in rows], (3, SIZE, SIZE))
    x = torch.stack([files[place][0] for place in range(len(rows))])
    normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = mine.eval()(normalised)
    if task == "multiclass":
        expected = expected.softmax(1)
    column = "probabilities" if task == "multiclass" else "values"
    found = torch.tensor([[row[column][name] for name in NAMES] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
