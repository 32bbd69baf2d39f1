"""What a finished classifier is used for, also one made of a module of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fragment_searches import digits, search, trainer
from doubles.own_modules import Classifier
from doubles.predictions import NAMES, SIZE, classifier, small_source, write_digits
from PIL import Image
from torch import Tensor, nn

from lightning_stitch import StitchedClassifier, StitchError
from lightning_stitch.cli.main import main
from lightning_stitch.data import ImageFileSet, list_images
from lightning_stitch.training import open_classifier


class Named(Classifier):
    """A module of one's own that knows its classes."""

    class_names = ("nought", "one", "two")


class Squared(Named):
    """One that does more than a linear layer behind its backbone."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) ** 2


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Named, Path]:
    """A module that a search filled, and its checkpoint."""
    folder, module = tmp_path_factory.mktemp("own"), Named()
    run = trainer(folder, search(attribute="backbone", head_attribute="head", max_candidates=4))
    run.fit(module, digits())
    run.save_checkpoint(folder / "own.ckpt")
    return module.eval(), folder / "own.ckpt"


def logits(module: nn.Module) -> Tensor:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module(images)


def test_images_in_memory_are_predicted_as_their_files_are(tmp_path: Path) -> None:
    model, folder = classifier(small_source(3)), write_digits(tmp_path, 40)
    files = list_images([folder])
    by_file = model.predict(folder)
    assert [row["file"] for row in by_file] == list(map(str, files))
    tensors = torch.stack([ImageFileSet(files, (3, SIZE, SIZE))[place][0] for place in range(len(files))])
    for images in ([Image.open(file) for file in files], tensors, list(map(str, files))):
        rows = model.predict(images)
        assert [row["class"] for row in rows] == [row["class"] for row in by_file]
        for row, expected in zip(rows, by_file, strict=True):
            assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
    assert [row["file"] for row in model.predict(tensors)] == [str(number) for number in range(len(files))]
    with pytest.raises(StitchError, match=r"\['batch_size'\] are for files"):
        model.predict(tensors, batch_size=3)
    with pytest.raises(StitchError, match="There are no images to predict"):
        model.predict([])
    with pytest.raises(StitchError, match="has no network yet"):
        StitchedClassifier(3, class_names=NAMES).predict(tensors)


def test_a_module_of_ones_own_is_saved_described_and_exported_as_a_classifier(
    own: tuple[Named, Path], tmp_path: Path
) -> None:
    module, _ = own
    assert module.backbone.projection is not None  # type: ignore[union-attr]
    model = StitchedClassifier.of_module(module)
    assert model.class_names == ["nought", "one", "two"]
    torch.testing.assert_close(logits(model), logits(module), rtol=1e-3, atol=1e-3)
    assert model.network is not None
    assert model.network.describe() == module.backbone.network.describe()  # type: ignore[union-attr,operator]
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(StitchedClassifier.from_pretrained(tmp_path / "saved")), logits(model))
    (exported,) = model.export(tmp_path / "own.pt2")
    assert exported.stat().st_size > 0


def test_the_command_line_predicts_with_a_checkpoint_of_a_module_of_ones_own(
    own: tuple[Named, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, checkpoint = own
    torch.testing.assert_close(logits(open_classifier(checkpoint)), logits(module), rtol=1e-3, atol=1e-3)
    folder = write_digits(tmp_path / "images", 9)
    main(["predict", str(checkpoint), str(folder), "--class_names", *module.class_names])
    lines = capsys.readouterr().out.splitlines()
    expected = StitchedClassifier.of_module(module).predict(folder)
    assert [line.split(",")[1] for line in lines[1:]] == [row["class"] for row in expected]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda module: Named(), {}, "one StitchedBackbone with a network; found none"),
        (lambda module: module, {"head_attribute": "hed"}, "There is none in 'hed'"),
        (lambda module: _unfitted(module), {}, "None is known: name it"),
        (lambda module: _squared(module), {}, "Squared does more than a linear layer behind its StitchedBackbone"),
    ],
)
def test_a_module_that_is_no_linear_layer_behind_a_backbone_is_refused(
    make: Any, options: dict[str, str], words: str, own: tuple[Named, Path]
) -> None:
    with pytest.raises(StitchError, match=words):
        StitchedClassifier.of_module(make(own[0]), **options)


def test_a_classifier_without_a_search_has_no_page_to_write(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="holds no search"):
        classifier(small_source(3)).report(tmp_path)


def _copy(module: Named, kind: type[Named]) -> Named:
    copied = kind()
    copied.load_state_dict(module.state_dict())
    return copied.eval()


def _squared(module: Named) -> Named:
    return _copy(module, Squared)


def _unfitted(module: Named) -> Named:
    copied = _copy(module, Named)
    copied.backbone.head_attribute = None  # type: ignore[assignment]
    return copied
