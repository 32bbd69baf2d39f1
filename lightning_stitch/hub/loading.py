"""Reading the folder of a stitched network, from whomever it comes.

Nothing is unpickled. What a folder says is checked before anything big happens: that its files are plain files, that
the weights are those that the config was written with, and that every tensor has the name, kind and shape that the
recipe asks for; the recipe's structure is built for that on the meta device, where tensors have no memory.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_stitch.errors import RecipeError, SourceError, StitchError, first_lines
from lightning_stitch.hub.folder import (
    _LOADERS,
    BUILDERS,
    CONFIG,
    MOST_CONFIG_BYTES,
    WEIGHTS,
    read_config,
    read_recipe,
    tensors_of,
)
from lightning_stitch.io import DTYPES, hub_file, sha256_of, versions
from lightning_stitch.recipe import Recipe
from lightning_stitch.sources import build_architecture, build_on_meta, give_memory

# A fragment that is used again and again is written once; nobody's network is nearly as many times its file.
_MOST_EXPANSION = 16


@dataclass(frozen=True, slots=True)
class PretrainedFolder:
    """A folder whose config was read and whose weights were found; make one with `open_pretrained`.

    Attributes:
        where: What the user wrote.
        kind: "network" or "classifier".
        recipe: The structure.
        own: What the config holds of this package's.
        weights: The file of weights; not read yet. None: random ones will do.
    """

    where: str
    kind: str
    recipe: Recipe
    own: dict[str, Any]
    weights: Path | None

    def load(self, build: Callable[[], nn.Module], *, trust_factory: bool = False) -> nn.Module:
        """The structure with its numbers, in eval mode.

        The structure is built without memory and compared with the file's header; then its tensors get memory, no more
        than the file's. Only where a trusted factory builds a part of it, memory comes first.

        Args:
            build: Builds the structure with any numbers: a module of the folder's parts by their names. What the folder
                holds of other parts is left alone.
            trust_factory: Whether the factory of a "python" source may be called.

        Raises:
            RecipeError: If the weights are not those of the config, or do not fit the structure.
        """
        foreign = [ref for ref in self.recipe.sources if ref.builder == "python"]
        for ref in foreign if not trust_factory else []:
            build_architecture(ref)  # says what it would import and call, and how to allow it
        if self.weights is None:
            return build().eval()
        self._check_file(self.weights)
        found = self._header(self.weights)
        parts = build() if foreign else self._imagined(build)
        self._check_tensors(parts, found)
        for part, module in parts.named_children():
            kinds = {found[f"{part}.{name}"][0] for name in tensors_of(module)}
            precisions = {kind for kind in kinds if kind is not None and kind.is_floating_point}
            if len(precisions) == 1:
                # The whole part, with what it computes with and the file does not hold.
                module.to(precisions.pop())
        give_memory(parts)
        self._fill(parts, self.weights)
        return parts.eval()

    def _fill(self, parts: nn.Module, weights: Path) -> None:
        """Take the numbers, one tensor after the other, so that they are not all there twice."""
        shared, kept = self.own["shared"], parts.state_dict(keep_vars=True)
        with safe_open(weights, framework="pt") as file:
            for name, tensor in tensors_of(parts).items():
                numbers = file.get_tensor(shared.get(name, name))
                if name not in kept:
                    # Some networks compute such buffers at their first image, of a size that the structure alone lacks.
                    owner, _, leaf = name.rpartition(".")
                    setattr(parts.get_submodule(owner), leaf, numbers)
                elif not name.startswith("head."):
                    # As precise as it was saved; the tensor itself stays, as several names may share it.
                    tensor.data = tensor.data.to(numbers.dtype)
                    tensor.data.copy_(numbers)
            if hasattr(parts, "head"):
                # Some heads take as many rows as they are given.
                head = parts.get_submodule("head")
                names = {name: f"head.{name}" for name in head.state_dict()}
                given = {name: file.get_tensor(shared.get(full, full)) for name, full in names.items()}
                head.load_state_dict(given)

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
                found = {name: (DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
        except SafetensorError as error:
            raise RecipeError(f"{WEIGHTS} of {self.where!r} is no safetensors file ({error}).") from error
        shared = self.own["shared"]
        lost = sorted(name for name in shared.values() if name not in found)
        if lost or found.keys() & shared.keys():
            raise RecipeError(f"{CONFIG} of {self.where!r} says that tensors share {lost[:3]}, which are not there.")
        found |= {alias: found[name] for alias, name in shared.items()}
        size = sum(math.prod(shape) * kind.itemsize for kind, shape in found.values() if kind is not None)
        if size > _MOST_EXPANSION * self.own["weights"]["bytes"]:
            raise RecipeError(
                f"{CONFIG} of {self.where!r} makes {size / 1e6:.0f} MB of tensors out of "
                f"{self.own['weights']['bytes'] / 1e6:.0f} MB of weights; no network shares that much."
            )
        return found

    def _check_tensors(self, parts: nn.Module, found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> None:
        """The same names, kinds and shapes."""
        wanted, kept = tensors_of(parts), parts.state_dict(keep_vars=True)
        names = {name.split(".")[0] for name in wanted}
        others = [name for name in found if name not in wanted and (name.split(".")[0] in names or not _is_part(name))]
        missing = [name for name in wanted if name not in found]
        if missing or others:
            raise RecipeError(
                f"The weights of {self.where!r} do not fit its recipe: {len(missing)} tensors are missing "
                f"({_first(missing)}), {len(others)} have no place in it ({_first(others)}).{self._other_versions()}"
            )
        for name, tensor in wanted.items():
            dtype, shape = found[name]
            # A head that keeps its rows has none until they are loaded.
            grows = tensor.numel() == 0 and name.startswith("head.") and len(shape) == tensor.dim() and shape[0] > 0
            same = shape[1:] == tuple(tensor.shape)[1:] if grows else shape == tuple(tensor.shape)
            same = same or name not in kept
            kind = dtype is not None and (
                (dtype.is_floating_point and tensor.is_floating_point()) or dtype == tensor.dtype
            )
            if not same or not kind:
                raise RecipeError(
                    f"The weights of {self.where!r} do not fit its recipe: {name} is {dtype} of shape {shape}, the "
                    f"recipe asks for {tensor.dtype} of shape {tuple(tensor.shape)}.{self._other_versions()}"
                )

    def _other_versions(self) -> str:
        """What it was written with, where that is not what is here."""
        given, here = self.own.get("versions"), versions(*BUILDERS)
        if not isinstance(given, dict):
            return ""
        others = [
            f"{name} {given[name]} (here {here.get(name)})"
            for name in here
            if given.get(name, here[name]) != here[name]
        ]
        return f" It was written with {', '.join(others)}." if others else ""


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


def _is_part(name: str) -> bool:
    return name.startswith(("network.", "head."))


def _first(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def open_folder(where: str | Path, *, loader: str, also: str | None = None) -> PretrainedFolder:
    """Find a saved network of one kind.

    Args:
        where: As for `open_pretrained`.
        loader: The class that is to load it.
        also: Another kind that it can take its part from.

    Raises:
        RecipeError: If it is of another kind; the message names the class that loads it.
    """
    folder = open_pretrained(where)
    if _LOADERS[folder.kind] != loader and folder.kind != also:
        raise RecipeError(
            f"{str(where)!r} holds what {_LOADERS[folder.kind]}.from_pretrained loads, not {loader}.from_pretrained."
        )
    return folder


class SavedPlace(Protocol):
    """Gives a saved network's files."""

    def fetch(self, name: str, *, size: int | None = None) -> Path:
        """A file that can be read.

        Args:
            name: Its name.
            size: Its bytes, where they are known before it is fetched; another size may be refused.

        Raises:
            SourceError: If it cannot be fetched.
            StitchError: If it is missing, or no plain file.
        """
        ...


class SavedFolder:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, name: str, *, size: int | None = None) -> Path:
        """The file, if it is one: a link may lead anywhere, and a pipe never ends."""
        path = self.folder / name
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError as error:
            raise StitchError(f"{self.folder} holds no {name}; save_pretrained writes it.") from error
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
            raise StitchError(f"{path} is {kind}. Only plain files inside the folder are read. {self._advice()}")
        return path

    def _advice(self) -> str:
        """The hub's client has links in its cache, which it would have to be asked about."""
        from huggingface_hub import constants

        snapshots = self.folder.absolute().parent
        if snapshots.name == "snapshots" and Path(constants.HF_HUB_CACHE).absolute() in snapshots.parents:
            repo = snapshots.parent.name.removeprefix("models--").replace("--", "/")
            return f"This is the hub client's cache: give {f'{repo}@{self.folder.name}'!r} instead of the folder."
        return "Put the file itself there."


class SavedRepository:
    """A repository on the hub; all files come from the commit of the first one."""

    def __init__(self, repository: str) -> None:
        repo, at, revision = repository.partition("@")
        if repo.count("/") != 1 or not all(repo.split("/")) or (at and not revision):
            raise SourceError(
                f"{repository!r} is neither a folder nor a hub repository. Expected a folder that holds {CONFIG} and "
                f"{WEIGHTS}, or 'ORG/NAME' or 'ORG/NAME@REVISION'."
            )
        self.repo = repo
        self.revision: str | None = revision or None

    def fetch(self, name: str, *, size: int | None = None) -> Path:
        """The file in the cache of the hub's client, which links to its own files there."""
        most = MOST_CONFIG_BYTES if name == CONFIG else None
        path = hub_file(self.repo, name, revision=self.revision, size=size, most=most)
        self.revision = path.parent.name  # the cache names the folder of a snapshot after its commit
        return path.resolve(strict=True)


def find_place(where: str | Path) -> SavedPlace:
    """A folder or a repository; nothing is read yet.

    Args:
        where: As for `open_pretrained`.

    Raises:
        SourceError: If there is no such folder, or it can be no repository's name.
    """
    prefix, colon, rest = str(where).partition(":")
    if isinstance(where, str) and colon and prefix in ("hf-hub", "hf_hub"):
        return SavedRepository(rest)
    local = isinstance(where, str) and bool(colon) and prefix == "local-dir"
    folder = Path(rest if local else where).expanduser()
    if folder.exists() or isinstance(where, Path) or local:
        if not folder.is_dir():
            raise SourceError(f"There is no folder {str(folder)!r}. Expected one that holds {CONFIG} and {WEIGHTS}.")
        return SavedFolder(folder)
    return SavedRepository(str(where))
