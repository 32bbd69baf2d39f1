"""Where a saved network is: a folder, or a repository on the hub, which may be a stranger's."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Protocol

from lightning_stitch._pretrained_config import CONFIG, MOST_CONFIG_BYTES, WEIGHTS
from lightning_stitch.errors import SourceError, StitchError
from lightning_stitch.io.hub_download import hub_file


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
