"""Networks as files that run without this package: ONNX, and PyTorch's own programs (`torch.export`).

BatchNorm is folded, images in [0, 1] are normalised inside, and any number of images may come at once. A network that
stops when it is sure runs as a whole, where every image pays for all of it, or as a file for each stage
(`per_stage=True`), which examples/run_stages.py runs one after another for the images that need them.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch.cutting import copy_module
from lightning_stitch.errors import StitchError, first_lines
from lightning_stitch.heads import StagedHead, Task, predictions
from lightning_stitch.io import complete_or_absent
from lightning_stitch.networks.network import StitchedNetwork

_LARGEST_ONNX = 2**31 - 1  # bytes of a protocol buffer
_OUTPUTS = {"multiclass": "probabilities", "multilabel": "probabilities", "regression": "numbers", None: "features"}


class WholeNetwork(nn.Module):
    """Images in [0, 1] -> probabilities, numbers, or without a task what the head gives."""

    inputs = ("images",)

    def __init__(self, network: StitchedNetwork, head: nn.Module, task: Task | None) -> None:
        super().__init__()
        self.network, self.head, self.task = network, head, task
        self.outputs = (_OUTPUTS[task],)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Of (batch, channels, height, width)."""
        outputs = self.head(self.network(images))
        return (outputs if self.task is None else predictions(self.task, outputs),)


class OneStage(nn.Module):
    """A stage of a network that stops when it is sure: what it says, whether it is sure, and what the next one needs.

    Args:
        network: The network.
        head: Its head.
        stage: Which one.
    """

    def __init__(self, network: StitchedNetwork, head: StagedHead, stage: int) -> None:
        super().__init__()
        self.network, self.head, self.stage = network, head, stage
        before, self._carried = network.carried_into(stage), network.carried_into(stage + 1)
        is_last = stage == len(head.heads) - 1
        carried_in = [] if stage == 0 else [f"features_{stage}", *(f"activation_{stage}_{index}" for index in before)]
        carried_out = [f"features_{stage + 1}", *(f"activation_{stage + 1}_{index}" for index in self._carried)]
        self._before = before
        self.inputs = (*(["images"] if network.reads_images(stage) else []), *carried_in)
        self.outputs = (_OUTPUTS[head.task], "sure", *([] if is_last else carried_out))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of what `inputs` names: what `outputs` names."""
        given = dict(zip(self.inputs, inputs, strict=True))
        activations = {index: given[f"activation_{self.stage}_{index}"] for index in self._before}
        features = given.get(f"features_{self.stage}")
        features = self.network.run_stage(self.stage, given.get("images"), features, activations)
        outputs = self.head.heads[self.stage](features)
        sure = self.head.is_sure(self.stage, outputs)
        answer = predictions(self.head.task, self.head.answer(outputs))
        carried = (features, *(activations[index] for index in self._carried))
        return (answer, sure, *(carried if len(self.outputs) > 2 else ()))


def export_network(
    network: StitchedNetwork,
    path: str | Path,
    *,
    head: nn.Module | None = None,
    task: Task | None = None,
    class_names: Sequence[str] | None = None,
    per_stage: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write a network, with a head, as a file that runs without this package.

    It takes "images" (batch, channels, height, width), float32, in [0, 1], of the recipe's size, and gives
    "probabilities", "numbers" or "features". Class names, size and recipe are in its metadata (JSON).

    Args:
        network: The network.
        path: Its suffix says what is written: ".onnx", or ".pt2" (`torch.export.load`).
        head: Its head; None: the features are given.
        task: What the head's outputs become; None: they are given as they are.
        class_names: For the metadata.
        per_stage: A file for each stage, "NAME.stage1.onnx" and so on.
        overwrite: Replace files of these names.

    Returns:
        The files.

    Raises:
        StitchError: If the suffix is another one, the network has no stages, a file is there, a package is missing,
            or the network cannot be exported so.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise StitchError(f"{path} should end in .onnx or .pt2, which says what is written.")
    if per_stage and not isinstance(head, StagedHead):
        raise StitchError("This network has no stages to export one by one; leave per_stage out.")
    stages = range(len(head.heads)) if per_stage and isinstance(head, StagedHead) else ()
    files = [path.with_suffix(f".stage{stage + 1}{path.suffix}") for stage in stages] or [path]
    for file in files:
        if file.exists() and not overwrite:
            raise StitchError(f"{file} is there already. Name another file, or say overwrite=True.")
    if path.suffix == ".onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise StitchError(f"ONNX needs {' and '.join(missing)}: pip install 'lightning-stitch[export]'")
    network, head = network.fused().cpu(), copy_module(nn.Identity() if head is None else head).cpu().eval()
    size = network.recipe.input_size
    facts = {"class_names": class_names, "task": task, "input_size": size, "recipe": network.recipe.to_dict()}
    metadata = {name: json.dumps(value) for name, value in facts.items() if value is not None}
    programs: list[Any] = [WholeNetwork(network, head, task)]
    if isinstance(head, StagedHead) and per_stage:
        programs = [OneStage(network, head, stage) for stage in stages]
    given: dict[str, Tensor] = {"images": torch.rand(2, *size)}
    for file, program in zip(files, programs, strict=True):
        arguments = tuple(given[name] for name in program.inputs)
        with torch.no_grad():
            given |= dict(zip(program.outputs, program(*arguments), strict=True))
        content = _content(program.eval(), arguments, file.suffix, metadata)
        with complete_or_absent(file) as writing:
            writing.write(content)
    return files


def _content(program: Any, arguments: tuple[Tensor, ...], suffix: str, metadata: dict[str, str]) -> bytes:
    """The bytes of a file."""
    takes_any = isinstance(program, OneStage)
    buffer = io.BytesIO()
    with torch.no_grad(), _quiet():
        try:
            if suffix == ".pt2":
                batch = tuple({0: torch.export.Dim("batch")} for _ in arguments)
                exported = torch.export.export(program, arguments, dynamic_shapes=(batch,) if takes_any else batch)
                torch.export.save(exported, buffer, extra_files=metadata)
                return buffer.getvalue()
            named = tuple({0: "batch"} for _ in arguments)
            onnx: Any = torch.onnx.export(
                program,
                arguments,
                dynamo=True,
                dynamic_shapes=(named,) if takes_any else named,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                verbose=False,
            )
        except Exception as error:  # whatever torch meets in an operation that it cannot write down
            reason = first_lines(error.__cause__ or error)
            raise StitchError(f"This network cannot be exported as {suffix}: {reason}") from error
        onnx.model.metadata_props.update(metadata)
        model = onnx.model_proto
    if model.ByteSize() > _LARGEST_ONNX:
        raise StitchError("This network is larger than one ONNX file can be (2 GB); export it as .pt2.")
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
