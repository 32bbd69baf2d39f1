"""Reading the folder of a stitched network, from whomever it comes.

Nothing is unpickled. The weights are those that the config was written with, and the recipe's structure is built on the
meta device, where tensors have no memory: all that it gets are the tensors of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, SourceError, StitchError, first_lines
from lightning_stitch.hub.folder import BUILDERS, read_config, tensors_of
from lightning_stitch.hub.structure import warn_of_changes
from lightning_stitch.io import (
    CONFIG,
    LARGEST_CONFIG,
    WEIGHTS,
    check_content,
    differences,
    hub_file,
    in_words,
    sha256_of,
    split_repository,
    versions,
)
from lightning_stitch.recipe import Recipe
from lightning_stitch.sources import build_architecture, build_on_meta


@dataclass(frozen=True, slots=True)
class PretrainedFolder:
    """A folder whose config was read and whose weights were found; make one with `open_pretrained`.

    `where` is what the user wrote; the file of weights is not read yet, and without one random weights will do.
    """

    where: str
    recipe: Recipe
    config: dict[str, Any]
    weights: Path | None

    @property
    def kind(self) -> str:
        """Either "network" or "classifier"."""
        return str(self.config["kind"])

    def load(self, build: Callable[[], nn.Module], *, trust_factory: bool = False) -> nn.Module:
        """The structure with its numbers, in eval mode; a `RecipeError` if the weights do not fit it or the config.

        What is built is a module of the folder's parts by their names; what the folder holds of others is left alone.
        """
        foreign = [ref for ref in self.recipe.sources if ref.builder == "python"]
        for ref in foreign if not trust_factory else []:
            build_architecture(ref)  # says what it would import and call, and how to allow it
        if self.weights is None:
            return build().eval()
        numbers = self._read_weights(self.weights)
        try:
            # A stranger's recipe may ask for more memory than there is.
            parts = build() if foreign else build_on_meta(build)
        except RecipeError:
            raise
        except Exception as error:  # whatever timm or torchvision meet in a recipe that nobody has tried
            raise RecipeError(
                f"The structure that {self.where!r} asks for cannot be built: {first_lines(error)}"
            ) from error
        self._fill(parts, numbers)
        warn_of_changes(self.config, parts.get_submodule("network"), repr(self.where))
        return parts.eval()

    def _read_weights(self, weights: Path) -> dict[str, Tensor]:
        """The file's tensors, provided that it is the file that the config was written with."""
        digest, expected = sha256_of(weights), self.config["weights"]["sha256"]
        if digest != expected:
            raise RecipeError(
                f"{weights.name} of {self.where!r} is not the file that its {CONFIG} was written with: its sha256 is "
                f"{digest[:12]}..., expected {expected[:12]}.... Fetch the folder again."
            )
        try:
            return load_file(weights)
        except SafetensorError as error:
            raise RecipeError(f"{weights.name} of {self.where!r} is no safetensors file ({error}).") from error

    def _fill(self, parts: nn.Module, numbers: Mapping[str, Tensor]) -> None:
        """Put the file's tensors in the structure's places, which have to be the same and of the same kinds."""
        prefixes = tuple(f"{part}." for part, _ in parts.named_children())
        numbers = {name: tensor for name, tensor in numbers.items() if name.startswith(prefixes)}
        places = tensors_of(parts)
        # A tensor of several names is in the file under one of them.
        written = {id(tensor): name for name, tensor in places.items() if name in numbers}
        missing = [name for name, tensor in places.items() if id(tensor) not in written]
        if missing or numbers.keys() - places.keys():
            self._refuse(f"missing are {missing[:3]}, without a place {sorted(numbers.keys() - places.keys())[:3]}")
        filled: dict[str, Tensor] = {}
        for name in written.values():
            place, tensor = places[name], numbers[name].clone()  # of its own, whatever becomes of the file
            same = place.is_floating_point() if tensor.is_floating_point() else tensor.dtype == place.dtype
            if not same:
                self._refuse(f"{name} is {tensor.dtype}, expected is {place.dtype}")
            filled[name] = nn.Parameter(tensor, place.requires_grad) if isinstance(place, nn.Parameter) else tensor
        state = parts.state_dict(keep_vars=True)
        for name, place in places.items():
            tensor = filled[written[id(place)]]
            if name in state:
                state[name] = tensor
            else:
                # A buffer that state dicts leave out; some networks compute it at their first image, of any size.
                owner, _, leaf = name.rpartition(".")
                setattr(parts.get_submodule(owner), leaf, tensor)
        try:
            parts.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            self._refuse(first_lines(error))

    def _refuse(self, problem: str) -> NoReturn:
        """Say that the weights do not fit, and where they were written by other versions than those here."""
        changes = differences(self.config.get("versions"), versions(*BUILDERS))
        hint = f" Versions differ: {in_words(changes)}." if changes else ""
        raise RecipeError(f"The weights of {self.where!r} do not fit its recipe: {problem}.{hint}")


def open_pretrained(where: str | Path, *, weights: bool = True) -> PretrainedFolder:
    """Find a saved network and read its config; of a hub repository both files are fetched, from one commit.

    Args:
        where: A folder, "local-dir:FOLDER", "ORG/NAME[@REVISION]" or "hf-hub:ORG/NAME[@REVISION]". A folder that is
            there goes before a repository of that name.
        weights: Whether the weights are wanted; otherwise they are not fetched.

    Raises:
        SourceError: If there is no such folder or repository, or the hub cannot be reached.
        StitchError: If a file is missing, or only a pointer to it is there.
        RecipeError: If the config is malformed, of another format, or its recipe is.
    """
    folder = _find_folder(where)
    file: Path | None = None
    if folder is not None:
        config, recipe = read_config(_file_in(folder, CONFIG), str(where))
        file = _file_in(folder, config["weights"]["file"]) if weights else None
    else:
        name = re.sub("^hf[-_]hub:", "", str(where))
        if (place := split_repository(name)) is None:
            raise SourceError(
                f"{name!r} is neither a folder nor a hub repository. Expected a folder that holds {CONFIG} and "
                f"{WEIGHTS}, or 'ORG/NAME' or 'ORG/NAME@REVISION'."
            )
        repo, revision = place
        config_file = hub_file(repo, CONFIG, revision=revision, most=LARGEST_CONFIG)
        config, recipe = read_config(config_file, str(where))
        if weights:
            # The cache names the folder of a snapshot after its commit.
            facts, commit = config["weights"], config_file.parent.name
            file = hub_file(repo, facts["file"], revision=commit, most=facts["bytes"])
    return PretrainedFolder(str(where), recipe, config, file)


def _find_folder(where: str | Path) -> Path | None:
    """The folder on this machine that is meant; None: a repository on the hub is."""
    is_text = isinstance(where, str)
    if is_text and re.match("hf[-_]hub:", str(where)):
        return None
    folder = Path(str(where).removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not is_text or str(where).startswith("local-dir:"):
        raise SourceError(f"There is no folder {str(folder)!r}. Expected one that holds {CONFIG} and {WEIGHTS}.")
    return None


def _file_in(folder: Path, name: str) -> Path:
    """A file of a folder; a pipe, which never ends, is none."""
    if not (folder / name).is_file():
        raise StitchError(f"{folder} holds no file {name}; save_pretrained writes it.")
    check_content(folder / name)
    return folder / name
