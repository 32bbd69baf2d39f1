"""Reading the folder of a stitched network, from whomever it comes.

Nothing is unpickled. The files are plain files, the weights those that the config was written with, and the recipe's
structure is built on the meta device, where tensors have no memory: all that it gets are the tensors of the file.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, SourceError, StitchError, first_lines
from lightning_stitch.hub.folder import _LOADERS, BUILDERS, read_config, read_recipe, tensors_of
from lightning_stitch.io import CONFIG, LARGEST_CONFIG, WEIGHTS, hub_file, sha256_of, split_repository, versions
from lightning_stitch.recipe import Recipe
from lightning_stitch.sources import build_architecture, build_on_meta


@dataclass(frozen=True, slots=True)
class PretrainedFolder:
    """A folder whose config was read and whose weights were found; make one with `open_pretrained`.

    Attributes:
        where: What the user wrote.
        kind: "network" or "classifier".
        recipe: The structure.
        config: What the config holds of this package's.
        weights: The file of weights; not read yet. None: random ones will do.
    """

    where: str
    kind: str
    recipe: Recipe
    config: dict[str, Any]
    weights: Path | None

    def load(self, build: Callable[[], nn.Module], *, trust_factory: bool = False) -> nn.Module:
        """The structure with its numbers, in eval mode.

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
        numbers = self._read(self.weights)
        parts = build() if foreign else self._build_on_meta(build)
        self._fill(parts, numbers)
        return parts.eval()

    def _read(self, weights: Path) -> dict[str, Tensor]:
        """The file's tensors, provided that it is the file that the config was written with."""
        expected, size = self.config["weights"], weights.stat().st_size
        if size != expected["bytes"]:
            raise RecipeError(
                f"{weights.name} of {self.where!r} has {size} bytes; its {CONFIG} was written with one of "
                f"{expected['bytes']}. It is cut short or another file: fetch the folder again."
            )
        if (digest := sha256_of(weights)) != expected["sha256"]:
            raise RecipeError(
                f"{weights.name} of {self.where!r} is not the file that its {CONFIG} was written with: its sha256 is "
                f"{digest[:12]}..., expected {str(expected['sha256'])[:12]}.... Fetch the folder again."
            )
        try:
            return load_file(weights)
        except SafetensorError as error:
            raise RecipeError(f"{weights.name} of {self.where!r} is no safetensors file ({error}).") from error

    def _build_on_meta(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The structure without memory: a stranger's recipe may ask for more than there is."""
        try:
            return build_on_meta(build)
        except RecipeError:
            raise
        except Exception as error:  # whatever timm or torchvision meet in a recipe that nobody has tried
            raise RecipeError(
                f"The structure that {self.where!r} asks for cannot be built: {first_lines(error)}"
            ) from error

    def _fill(self, parts: nn.Module, numbers: Mapping[str, Tensor]) -> None:
        """Put the file's tensors in the structure's places, which have to be the same and of the same kinds."""
        elsewhere = tuple(f"{part}." for part in ("network", "head") if not hasattr(parts, part))
        numbers = {name: tensor for name, tensor in numbers.items() if not name.startswith(elsewhere)}
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
        made_with, here = self.config.get("versions"), versions(*BUILDERS)
        made_with = made_with if isinstance(made_with, dict) else {}
        differing = [
            f"{name} {made_with[name]} (here {version})"
            for name, version in here.items()
            if made_with.get(name, version) != version
        ]
        hint = f" It was written with {', '.join(differing)}." if differing else ""
        raise RecipeError(f"The weights of {self.where!r} do not fit its recipe: {problem}.{hint}")


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
    folder = _local_folder(where)
    if folder is None:
        repo, revision = _repository(str(where))
        config_file = hub_file(repo, CONFIG, revision=revision, most=LARGEST_CONFIG)
    else:
        config_file = _plain_file(folder, CONFIG)
    config = read_config(config_file, str(where))
    recipe = read_recipe(config, str(where))
    file, name, size = None, config["weights"]["file"], config["weights"]["bytes"]
    if weights and folder is not None:
        file = _plain_file(folder, name)
    elif weights:
        # The cache names the folder of a snapshot after its commit, and links to its own files from there.
        file = hub_file(repo, name, revision=config_file.parent.name, most=size).resolve(strict=True)
    return PretrainedFolder(str(where), config["kind"], recipe, config, file)


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


def _local_folder(where: str | Path) -> Path | None:
    """The folder on this machine that is meant; None: a repository on the hub is."""
    prefix, colon, rest = str(where).partition(":")
    if isinstance(where, str) and colon and prefix in ("hf-hub", "hf_hub"):
        return None
    local = isinstance(where, str) and bool(colon) and prefix == "local-dir"
    folder = Path(rest if local else where).expanduser()
    if not (folder.exists() or isinstance(where, Path) or local):
        return None
    if not folder.is_dir():
        raise SourceError(f"There is no folder {str(folder)!r}. Expected one that holds {CONFIG} and {WEIGHTS}.")
    return folder


def _repository(where: str) -> tuple[str, str | None]:
    """Name and revision of a repository."""
    words = re.sub("^hf[-_]hub:", "", where)
    if (place := split_repository(words)) is None:
        raise SourceError(
            f"{words!r} is neither a folder nor a hub repository. Expected a folder that holds {CONFIG} and "
            f"{WEIGHTS}, or 'ORG/NAME' or 'ORG/NAME@REVISION'."
        )
    return place


def _plain_file(folder: Path, name: str) -> Path:
    """A file of a folder, if it is one: a link may lead anywhere, and a pipe never ends."""
    from huggingface_hub import constants

    path = folder / name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        raise StitchError(f"{folder} holds no {name}; save_pretrained writes it.") from error
    if stat.S_ISREG(mode):
        return path
    advice, snapshots = "Put the file itself there.", folder.absolute().parent
    # The hub's client has links in its cache, which it would have to be asked about.
    if snapshots.name == "snapshots" and Path(constants.HF_HUB_CACHE).absolute() in snapshots.parents:
        repo = snapshots.parent.name.removeprefix("models--").replace("--", "/")
        advice = f"This is the hub client's cache: give {f'{repo}@{folder.name}'!r} instead of the folder."
    kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
    raise StitchError(f"{path} is {kind}. Only plain files inside the folder are read. {advice}")
