"""What a finished classifier is used for: predictions, folders, the hub, exports, the page of its search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lightning_stitch._lightning import pl
from lightning_stitch.cutting import in_eval_mode
from lightning_stitch.data import decode_images, is_files
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.hub import CardDetails, Publication, publish
from lightning_stitch.networks import (
    StitchedBackbone,
    StitchedNetwork,
    check_numbers,
    export_network,
    load_classifier,
    save_classifier,
    saved_backbones,
)
from lightning_stitch.recipe import Recipe
from lightning_stitch.report import prediction_rows, write_page
from lightning_stitch.search import SearchResult
from lightning_stitch.tables import Record
from lightning_stitch.training.predicting import predict_files

_BATCH = 32


class Finished(pl.LightningModule):
    """What a `StitchedClassifier` does once it has its network.

    Attributes:
        result: What was found by the `compose` that made it; None: it was made otherwise.
        record: What the page of that search is made of.
    """

    network: StitchedNetwork | None
    head: nn.Module | None
    head_settings: HeadSettings
    result: SearchResult | None = None
    record: Record | None = None
    if TYPE_CHECKING:

        def __init__(self, *args: Any, **options: Any) -> None: ...
        def install(self, network: StitchedNetwork, head: nn.Module) -> None: ...  # noqa: D102
        @property
        def class_names(self) -> list[str] | None: ...  # noqa: D102
        @property
        def task(self) -> str: ...  # noqa: D102

    def predict(self, images: Any, **options: Any) -> list[Record]:
        """A row for each image: its class and every class's probability (`report.prediction_rows`).

        Args:
            images: Files and folders of them; or images in memory, a tensor (images, channels, height, width) or a
                sequence of tensors, PIL images or arrays, float in [0, 1] or uint8, whose rows name them by number.
            options: For files, those of `predict_files`.

        Raises:
            CalibrationError: If an image cannot be used, or there are none.
            StitchError: If there is no network yet; likewise as `predict_files`.
        """
        if is_files(images):
            return predict_files(self, images, **options)
        if options:
            raise StitchError(f"{sorted(options)} are for files; images in memory are predicted as they are.")
        shape = self._finished().recipe.input_size
        if not len(images):
            raise CalibrationError("There are no images to predict.")
        with torch.inference_mode(), in_eval_mode(self):
            outputs = [
                self.predict_step(decode_images(images[start : start + _BATCH], shape).to(self.device), 0)
                for start in range(0, len(images), _BATCH)
            ]
        names = [str(number) for number in range(len(images))]
        return prediction_rows(names, torch.cat(outputs).cpu(), self.class_names, task=self.task)

    def report(self, directory: str | Path) -> Path:
        """Write the page of the search that composed it, report.html with its figures; returns where it is.

        Raises:
            StitchError: If it was not `compose` that made it from sources: `FragmentSearch` writes its page itself.
        """
        if self.record is None:
            raise StitchError(
                "This classifier holds no search: compose(sources, ...) makes one that does. FragmentSearch leaves its "
                "page in the log directory; `lightning-stitch report RUN` makes it again."
            )
        return write_page(self.record, Path(directory))

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        details: CardDetails | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write network, head, task and class names, and a card, as `StitchedNetwork.save_pretrained`."""
        save_classifier(self, directory, details=details, name=name, overwrite=overwrite)

    def publish(self, repo_id: str, **options: Any) -> Publication:
        """Publish it on the hub, in one commit, as `lightning_stitch.publish`, which has the same options."""
        return publish(self, repo_id, **options)

    def export(self, path: str | Path, *, per_stage: bool = False, overwrite: bool = False) -> list[Path]:
        """Write network and head as a file that runs without this package: `export_network`.

        Args:
            path: Ends in ".onnx", or in ".pt2" (`torch.export.load`).
            per_stage: A file for each stage of a network that stops when it is sure; as a whole it runs all.
            overwrite: Replace files of these names.

        Returns:
            The files. They take "images" (batch, channels, height, width), float32, in [0, 1], and give "probabilities"
            of classes or labels, "numbers", or without a head "features".

        Raises:
            StitchError: If there is no network yet, a package is missing, or it cannot be written so.
        """
        network, settings = self._finished(), self.head_settings
        task = None if settings.name == "none" else settings.task
        names = self.class_names
        return export_network(
            network, path, head=self.head, task=task, class_names=names, per_stage=per_stage, overwrite=overwrite
        )

    @classmethod
    def from_pretrained(cls, where: str | Path, *, trust_factory: bool = False, **options: Any) -> Self:
        """Load what `save_pretrained` or `publish` wrote, as `StitchedNetwork.from_pretrained`; in eval mode.

        Args:
            where: A folder, or a hub repository "ORG/NAME" or "ORG/NAME@REVISION".
            trust_factory: Allow importing and calling the factory that a "python:" source names.
            options: Arguments of the class that say how it trains on: optimizer, thaw, train_mode, lr, ...
        """
        saved = load_classifier(where, trust_factory=trust_factory)
        model = cls(**saved.arguments, trust_factory=trust_factory, **options)
        model.install(saved.network, saved.head)
        return model.eval()

    @classmethod
    def of_module(cls, module: nn.Module, *, head_attribute: str | None = None) -> Self:
        """A module of your own as a classifier, which can be saved, published, exported and described.

        Its forward has to be a linear layer behind a `StitchedBackbone`; that is checked on random images.

        Args:
            module: The module; its attributes `class_names` and `task` ("multiclass" where there is none) are taken.
            head_attribute: Where the linear layer is, by dotted name; None: where `FragmentSearch` fitted it.

        Returns:
            A classifier with weights of its own, in eval mode. It takes images in [0, 1], not normalised.

        Raises:
            StitchError: If there is no network, not one backbone, no such layer, or forward does something else.
        """
        names, task = getattr(module, "class_names", None), getattr(module, "task", "multiclass")
        model = cls.of_state(
            module.state_dict(),
            head_attribute=head_attribute,
            task=task,
            class_names=None if names is None else list(names),
        )
        (backbone,) = (part for part in module.modules() if isinstance(part, StitchedBackbone) and part.recipe)
        shape = model._finished().recipe.input_size
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(backbone.mean.device)
        with torch.no_grad(), in_eval_mode(module):
            expected = module((images - backbone.mean) / backbone.std).float().cpu()
            difference = float((model(images.cpu()) - expected).abs().max())
        if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
            raise StitchError(
                f"{type(module).__name__} does more than a linear layer behind its StitchedBackbone (outputs differ by "
                f"{difference:.3g}), so it is no StitchedClassifier. Save and publish the network alone: its "
                f"StitchedBackbone's .network."
            )
        return model

    @classmethod
    def of_state(
        cls,
        state: Mapping[str, Any],
        *,
        head_attribute: str | None = None,
        task: str = "multiclass",
        class_names: list[str] | None = None,
    ) -> Self:
        """As `of_module`, of a state dict: of a checkpoint whose module's class is not at hand. Nothing is checked.

        Args:
            state: The state dict, with one stitched backbone.
            head_attribute: As for `of_module`.
            task: What the head's outputs are.
            class_names: What they are of.

        Raises:
            StitchError: If there is not one backbone with a network, or no linear layer behind it.
        """
        found = {name: one for name, one in saved_backbones(state).items() if one.get("recipe") is not None}
        if len(found) != 1:
            raise StitchError(f"There should be one StitchedBackbone with a network; found {sorted(found) or 'none'}.")
        ((attribute, structure),) = found.items()
        behind = head_attribute or structure.get("head_attribute")
        weight, bias = state.get(f"{behind}.weight"), state.get(f"{behind}.bias")
        if weight is None or weight.ndim != 2:
            where = "None is known" if behind is None else f"There is none in {behind!r}"
            raise StitchError(
                f"A module of your own is read as a linear layer behind its StitchedBackbone {attribute!r}. {where}: "
                f"name it (head_attribute=), to FragmentSearch too, which then fits it. Other modules' images are "
                f"predicted by predict_files, and their backbone's .network is saved and published alone."
            )
        weight, bias = weight.float(), torch.zeros(len(weight)) if bias is None else bias.float()
        if structure.get("projected"):
            before, offset = (state[f"{attribute}.projection.{name}"].float() for name in ("weight", "bias"))
            weight, bias = weight @ before, bias + weight @ offset
        prefix = f"{attribute}.network."
        numbers = {f"network.{key.removeprefix(prefix)}": x for key, x in state.items() if key.startswith(prefix)}
        numbers |= {"head.weight": weight, "head.bias": bias}
        recipe = Recipe.from_dict(structure["recipe"])
        check_numbers(recipe, HeadSettings.of("ridge", task=task, num_classes=len(weight)), numbers)
        model = cls(len(weight), recipe=structure["recipe"], task=task, class_names=class_names)
        model.configure_model()
        model.load_state_dict(numbers)
        return model.eval()

    def _finished(self) -> StitchedNetwork:
        if self.network is None:
            raise StitchError(NO_NETWORK)
        return self.network


NO_NETWORK = (
    "This StitchedClassifier has no network yet. Put a FragmentSearch among the Trainer's callbacks and call fit, load "
    "a checkpoint, or give a recipe."
)
