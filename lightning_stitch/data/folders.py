"""Folders of images: which files are images, which folders are sets, which are classes, and what is left out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_stitch.data.images import open_image
from lightning_stitch.errors import CalibrationError

# Registered with Pillow, which finds out what they are but needs another program or library to read them.
_UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "desktop.ini"),
}
_SETS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validate", "validation", "eval", "evaluation", "dev"},
    "test": {"test", "testing"},
}
_FILLER = re.compile("^(sets?|data|dataset|images?|imgs?|folder|seg|split|)$|(?<=.)(sets?|data|images?|imgs?)$")
_NUM_LISTED = 5


def image_suffixes() -> tuple[str, ...]:
    """Suffixes of all files that Pillow reads, in lower case, sorted."""
    Image.init()
    formats = Image.registered_extensions()
    return tuple(sorted(suffix for suffix, kind in formats.items() if kind in Image.OPEN and kind not in _UNREADABLE))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for a system or a tool (.git, .ipynb_checkpoints, @eaDir, Thumbs.db)."""
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM_NAMES


class ClassFolders(ImageFolder):
    """An `ImageFolder` of all that Pillow reads, without hidden and system folders.

    Attributes:
        left_out: The files that are no images, and the images in hidden folders.
    """

    def __init__(self, root: Path) -> None:
        suffixes = image_suffixes()
        self.left_out: list[str] = []

        def is_image(path: str) -> bool:
            hidden = any(is_hidden(part) for part in Path(path).relative_to(root).parts)
            is_taken = path.lower().endswith(suffixes) and not hidden
            if not is_taken and not is_hidden(os.path.basename(path)):
                self.left_out.append(path)
            return is_taken

        super().__init__(str(root), loader=open_image, is_valid_file=is_image)
        self.left_out += [str(path) for path in root.iterdir() if path.is_file() and not is_hidden(path.name)]
        for folder in (path for path in root.iterdir() if path.is_dir() and is_hidden(path.name)):
            self.left_out += [str(path) for path in folder.rglob("*") if path.is_file()]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The folders that are not hidden, sorted."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not is_hidden(entry.name))
        if not names:
            raise FileNotFoundError("It has no folder that could be a class.")
        return names, {name: number for number, name in enumerate(names)}


def open_class_folders(root: Path) -> dict[str, ImageFolder]:
    """Open the sets of an image folder, and warn of what is left out.

    Raises:
        CalibrationError: If there is no folder, it has no classes, two folders are the same set, or the classes seem to
            be one level further down.
    """
    if not root.is_dir():
        raise CalibrationError(f"image_folder: {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    sets = _find_sets(root)
    nested = [name for name, path in sets.items() if _subfolders(path)]
    if nested and "train" not in nested:
        raise CalibrationError(f"image_folder: {root} has class folders in {nested}, but none in train.")
    folders = {}
    left_out: list[str] = []
    for name, path in (sets if nested else {"train": root}).items():
        _check_level(path)
        try:
            folders[name] = ClassFolders(path)
        except FileNotFoundError as error:
            inside = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
            raise CalibrationError(
                f"image_folder: {path} should hold one folder of images for each class; it holds {len(inside)} "
                f"entries {inside[:8]}. {error}"
            ) from error
        left_out += folders[name].left_out
    if nested:
        beside = [path for path in root.iterdir() if not is_hidden(path.name) and _set_of(path.name) is None]
        left_out += [f"{path}{os.sep * path.is_dir()}" for path in beside]
    if left_out:
        warnings.warn(
            f"image_folder: {len(left_out)} files and folders of {root} are left out, as they are no images, "
            f"hidden, or outside of the sets: {list_first(sorted(left_out))}.",
            stacklevel=3,
        )
    return folders


def list_first(names: Sequence[str]) -> str:
    """Name the first few, and how many there are besides."""
    rest = len(names) - _NUM_LISTED
    return ", ".join(names[:_NUM_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _set_of(folder: str) -> str | None:
    """The set that a folder's name says: "train", "val", "test", in any case, with what is often put beside it."""
    words = [_FILLER.sub("", word) for word in re.findall("[a-z]+", folder.lower())]
    told = "".join(words)
    return next((name for name, known in _SETS.items() if told in known), None)


def _subfolders(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not is_hidden(child.name))


def _find_sets(root: Path) -> dict[str, Path]:
    """The folders of train, val and test that a folder holds."""
    sets: dict[str, Path] = {}
    for folder in _subfolders(root):
        name, path = _set_of(folder), root / folder
        if name is None:
            continue
        if name in sets:
            raise CalibrationError(
                f"image_folder: {sets[name]} and {path} are both taken for {name}. Leave or name only one of them so."
            )
        inside = _subfolders(path)
        if len(inside) == 1 and _set_of(inside[0]) == name:
            path = path / inside[0]  # as archives are packed that hold one folder of their own name
        sets[name] = path
    return sets


def _check_level(path: Path) -> None:
    """Refuse would-be classes that all hold folders of the same names, which are the classes then, or masks."""
    classes = _subfolders(path)
    inside = [set(_subfolders(path / name)) for name in classes]
    common = sorted(set.intersection(*inside)) if inside else []
    if len(common) > 1:
        raise CalibrationError(
            f"image_folder: {path} seems one folder too high: all of its {len(classes)} folders {classes[:5]} hold the "
            f"same folders {common[:5]}. Give the folder whose folders are the classes, or train, val and test."
        )
