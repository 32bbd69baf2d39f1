"""Folders of a stitched network: config.json and model.safetensors, written, and read from whomever they come.

Nothing is unpickled. What a folder says is checked before anything big happens: that its files are plain files, that
the weights are those that the config was written with, and that every tensor has the name, kind and shape that the
recipe asks for; the recipe's structure is built for that on the meta device, where tensors have no memory.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_stitch._blueprint import first_lines
from lightning_stitch._hub_files import sha256_of
from lightning_stitch._meta import build_on_meta
from lightning_stitch._pretrained_config import ARCHITECTURE, CONFIG, FORMAT, WEIGHTS, read_config, read_recipe
from lightning_stitch._pretrained_places import find_place
from lightning_stitch._tensor_files import UNFINISHED, raw_bytes, write_json
from lightning_stitch.ensemble_recipe import EnsembleRecipe
from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.recipe import Recipe, SourceRef

CARD, PICTURE = "README.md", "composition.png"
# Smaller tensors that happen to be alike (counters, zeros) are not worth an entry.
_LEAST_SHARED_BYTES = 1024
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def check_rebuildable(recipe: Recipe | EnsembleRecipe) -> None:
    """Refuse a recipe whose structure nobody else could build.

    Raises:
        RecipeError: If a source is a live module, or the recipe says no image size.
    """
    live = [ref for ref in recipe.sources if ref.builder == "live"]
    if live:
        raise RecipeError(
            f"Source {live[0].name!r} was given as a live module ({live[0].architecture}), which has no factory that "
            f"could build it elsewhere. Load it as 'python:package.module:factory', with a function that returns such "
            f"a module, and compose again; or share the program itself, which needs no recipe: "
            f"torch.export.save(torch.export.export(network.eval(), (images,)), 'network.pt2')."
        )
    if recipe.input_size is None:
        raise RecipeError("This recipe does not say which image size it was calibrated on (input_size).")


def check_writable(directory: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds what would be written.

    Raises:
        StitchError: If it does, or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise StitchError(f"{directory} is a file; a stitched network is saved in a folder.")
    there = [name for name in (CONFIG, WEIGHTS, CARD, PICTURE) if (directory / name).exists()]
    if there and not overwrite:
        raise StitchError(f"{directory} already holds {', '.join(there)}. Take another folder, or pass overwrite=True.")


def write_pretrained(
    parts: Mapping[str, nn.Module],
    directory: Path,
    *,
    recipe: Recipe | EnsembleRecipe,
    kind: str,
    num_outputs: int,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors; weights that are alike are there once.

    Args:
        parts: "network", and "head" where there is one.
        directory: The folder; made if it does not exist.
        recipe: The structure of the network.
        kind: "network", "ensemble" or "classifier".
        num_outputs: Width of the output.
        task: For a classifier its head, task, num_classes and class_names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors, shared = _without_doubles(_state_of(parts))
    unfinished = directory / f"{WEIGHTS}{UNFINISHED}"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        # safetensors makes it the owner's alone; whoever may read the folder may read the file.
        unfinished.chmod(directory.stat().st_mode & 0o666)
        os.replace(unfinished, directory / WEIGHTS)
    finally:
        unfinished.unlink(missing_ok=True)
    own: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "recipe": shown_recipe(recipe),
        **(task or {}),
        "weights": {"sha256": sha256_of(directory / WEIGHTS), "bytes": (directory / WEIGHTS).stat().st_size},
        "shared": shared,
        "versions": _versions(),
    }
    names = own.get("class_names")
    config = {
        # What timm.create_model("local-dir:...") reads. The network normalises its images itself: mean 0, std 1.
        "architecture": ARCHITECTURE,
        "num_classes": num_outputs,
        **({"label_names": names} if names else {}),
        "pretrained_cfg": {
            "input_size": list(recipe.input_size or ()),
            "mean": [0.0] * (recipe.input_size or (3,))[0],
            "std": [1.0] * (recipe.input_size or (3,))[0],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "num_classes": num_outputs,
        },
        ARCHITECTURE: own,
    }
    write_json(directory / CONFIG, config)


@dataclass(frozen=True, slots=True)
class PretrainedFolder:
    """A folder whose config was read and whose weights were found; make one with `open_pretrained`.

    Attributes:
        where: What the user wrote.
        kind: "network", "ensemble" or "classifier".
        recipe: The structure.
        own: What the config holds of this package's.
        weights: The file of weights; not read yet. None: random ones will do.
    """

    where: str
    kind: str
    recipe: Recipe | EnsembleRecipe
    own: dict[str, Any]
    weights: Path | None

    def load(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The structure with its numbers, in eval mode.

        Args:
            build: Builds the structure with any numbers: a module of the folder's parts by their names. What the folder
                holds of other parts is left alone.

        Raises:
            RecipeError: If the weights are not those of the config, or do not fit the structure.
        """
        if self.weights is None:
            return build().eval()
        self._check_file(self.weights)
        shapes = self._header(self.weights)
        if all(ref.builder != "python" for ref in self.recipe.sources):
            self._check_tensors(self._imagined(build), shapes)
        parts = build()
        self._check_tensors(parts, shapes)
        gc.collect()  # the whole sources, of whose fragments these are copies, hold themselves in circles
        for part, module in parts.named_children():
            kinds = {shapes[f"{part}.{name}"][0] for name in module.state_dict()}
            precisions = {kind for kind in kinds if kind is not None and kind.is_floating_point}
            if len(precisions) == 1:
                # The whole part, with what it computes with and the state dict does not hold.
                module.to(precisions.pop())
        shared, grown = self.own["shared"], {}
        with safe_open(self.weights, framework="pt") as file:
            for name, tensor in parts.state_dict(keep_vars=True).items():
                numbers = file.get_tensor(shared.get(name, name))
                if tensor.shape != numbers.shape:
                    grown[name.removeprefix("head.")] = numbers
                    continue
                # One after the other, so that they are not all there twice. Of the same precision as it was saved in;
                # the tensor itself stays, as several names may share it.
                tensor.data = tensor.data.to(numbers.dtype)
                tensor.data.copy_(numbers)
        if grown:
            head = parts.get_submodule("head")
            head.load_state_dict({**head.state_dict(), **grown})
        return parts.eval()

    def _imagined(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The structure without memory: a stranger's recipe may ask for more than there is."""
        try:
            return build_on_meta(build)
        except RecipeError:
            raise
        except Exception as error:  # whatever timm or torchvision meet in a recipe that nobody has tried
            raise RecipeError(
                f"The structure that {self.where!r} asks for cannot be built: {first_lines(error)}"
            ) from error

    def _check_file(self, weights: Path) -> None:
        """The file is that of the config, before it is opened as anything."""
        found = weights.stat().st_size
        expected = self.own["weights"]
        if found != expected["bytes"]:
            raise RecipeError(
                f"{WEIGHTS} of {self.where!r} has {found} bytes; its {CONFIG} was written with one of "
                f"{expected['bytes']}. It is cut short or another file: fetch the folder again."
            )
        if (digest := sha256_of(weights)) != expected["sha256"]:
            raise RecipeError(
                f"{WEIGHTS} of {self.where!r} is not the file that its {CONFIG} was written with: its sha256 is "
                f"{digest[:12]}..., expected {str(expected['sha256'])[:12]}.... Fetch the folder again."
            )

    def _header(self, weights: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Kind and shape of each tensor, no tensor read."""
        try:
            with safe_open(weights, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                found = {name: (_DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
        except SafetensorError as error:
            raise RecipeError(f"{WEIGHTS} of {self.where!r} is no safetensors file ({error}).") from error
        shared = self.own["shared"]
        lost = sorted(name for name in shared.values() if name not in found)
        if lost or found.keys() & shared.keys():
            raise RecipeError(f"{CONFIG} of {self.where!r} says that tensors share {lost[:3]}, which are not there.")
        return found | {alias: found[name] for alias, name in shared.items()}

    def _check_tensors(self, parts: nn.Module, found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> None:
        """The same names, kinds and shapes."""
        wanted = parts.state_dict(keep_vars=True)
        names = {name.split(".")[0] for name in wanted}
        others = [name for name in found if name not in wanted and (name.split(".")[0] in names or not _is_part(name))]
        missing = [name for name in wanted if name not in found]
        if missing or others:
            raise RecipeError(
                f"The weights of {self.where!r} do not fit its recipe: {len(missing)} tensors are missing "
                f"({_first(missing)}), {len(others)} have no place in it ({_first(others)})."
            )
        for name, tensor in wanted.items():
            dtype, shape = found[name]
            # A head that keeps its rows has none until they are loaded.
            grows = tensor.numel() == 0 and name.startswith("head.") and len(shape) == tensor.dim()
            same = shape[1:] == tuple(tensor.shape)[1:] if grows else shape == tuple(tensor.shape)
            kind = dtype is not None and (
                (dtype.is_floating_point and tensor.is_floating_point()) or dtype == tensor.dtype
            )
            if not same or not kind:
                raise RecipeError(
                    f"The weights of {self.where!r} do not fit its recipe: {name} is {dtype} of shape {shape}, the "
                    f"recipe asks for {tensor.dtype} of shape {tuple(tensor.shape)}."
                )


def open_pretrained(where: str | Path, *, weights: bool = True) -> PretrainedFolder:
    """Find a saved network and read its config; of a hub repository both files are fetched, from one commit.

    Args:
        where: A folder, "local-dir:FOLDER", "ORG/NAME[@REVISION]" or "hf-hub:ORG/NAME[@REVISION]". A folder that is
            there goes before a repository of that name.
        weights: Whether the weights are wanted; otherwise they are not fetched.

    Raises:
        SourceError: If there is no such folder or repository, or the hub cannot be reached.
        StitchError: If a file is missing, or not a plain file in the folder.
        RecipeError: If the config is malformed, of another format, or its recipe is.
    """
    place = find_place(where)
    own = read_config(place.fetch(CONFIG), str(where))
    recipe = read_recipe(own, str(where))
    file = place.fetch(WEIGHTS, size=own["weights"]["bytes"]) if weights else None
    return PretrainedFolder(str(where), own["kind"], recipe, own, file)


def shown_spec(ref: SourceRef) -> str:
    """A source's spec without the folders of the machine it was made on."""
    prefix, colon, rest = ref.spec.partition(":")
    return f"local-dir:{Path(rest).name}" if colon and prefix == "local-dir" else ref.spec


def shown_recipe(recipe: Recipe | EnsembleRecipe) -> dict[str, Any]:
    """A recipe as plain JSON for others to read: without the folders of the machine it was made on."""
    plain = recipe.to_dict()
    for entry, ref in zip(plain["sources"], recipe.sources, strict=True):
        entry["spec"] = shown_spec(ref)
    return plain


def _state_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.detach()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _without_doubles(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of different numbers, and of the others by which name they are to be found."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    memories: set[int] = set()
    for name, tensor in state.items():
        numbers = tensor.contiguous().cpu()
        key = (numbers.dtype, tuple(numbers.shape), hashlib.sha256(raw_bytes(numbers)).digest())
        if numbers.nbytes >= _LEAST_SHARED_BYTES and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        memory = numbers.untyped_storage()
        if memory.data_ptr() in memories or memory.nbytes() != numbers.nbytes:
            # Two small tensors may be one and the same, or parts of one, which safetensors refuses.
            numbers = numbers.clone()
        memories.add(memory.data_ptr())
        tensors[name] = numbers
    return tensors, shared


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lightning_stitch", "torch", "torchvision", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _is_part(name: str) -> bool:
    return name.startswith(("network.", "head."))


def _first(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
