"""A hub repository to write to: what is there, one commit, and the client's errors in words that help."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_stitch._blueprint import first_lines, offline
from lightning_stitch._hub_files import client_errors
from lightning_stitch.errors import SourceError, StitchError
from lightning_stitch.pretrained_files import CARD

_TRIES = 4
_LONGEST_WAIT = 60.0
# Too many requests, and what is wrong with a server for a while.
_FOR_A_WHILE = (429, 500, 502, 503, 504)

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a network was published.

    Attributes:
        repo_id: "ORG/NAME".
        url: The repository's page.
        commit: The commit's hash; "ORG/NAME@COMMIT" loads this very network.
        commit_url: The commit's page.
    """

    repo_id: str
    url: str
    commit: str
    commit_url: str


@dataclass(frozen=True, slots=True)
class Place:
    """What is there already.

    Attributes:
        exists: Whether the repository is there.
        branch: Whether the revision is.
        head: Its commit; None: there is none.
        has_card: Whether it holds a README.md.
    """

    exists: bool
    branch: bool
    head: str | None
    has_card: bool


class HubRepository:
    """One repository on the hub; what the client raises comes in words that help."""

    def __init__(self, repo_id: str, token: str | None) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi(token=token, library_name="lightning-stitch")
        self.repo_id = repo_id

    def check_credentials(self) -> None:
        """Ask the hub who is asking."""
        from huggingface_hub.errors import LocalTokenNotFoundError

        if offline():
            raise StitchError("HF_HUB_OFFLINE is set, and publishing needs the hub. Unset it first.")
        try:
            self._asked(self.api.whoami, "ask the hub who you are")
        except LocalTokenNotFoundError as error:
            raise StitchError(
                "The hub needs to know who publishes: log in with `hf auth login`, or set HF_TOKEN."
            ) from error

    def find(self, revision: str | None, private: bool | None) -> Place:
        """What is there already."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info: Any = self._asked(lambda: self.api.model_info(self.repo_id, revision=revision), "look it up")
            branch = True
        except RevisionNotFoundError:
            info, branch = self._asked(lambda: self.api.model_info(self.repo_id), "look it up"), False
        except RepositoryNotFoundError:
            return Place(False, False, None, False)
        if private is not None and bool(info.private) != private:
            is_, wanted = ("private", "public") if info.private else ("public", "private")
            raise StitchError(
                f"{self.repo_id!r} is there and {is_}; private={private} asks for a {wanted} one. Take another name, "
                f"or change it on its page first."
            )
        # A branch that is made now begins as a copy of main.
        names = {file.rfilename for file in info.siblings or []}
        return Place(True, branch, info.sha, CARD in names)

    def upload(
        self,
        folder: Path,
        files: list[str],
        place: Place,
        *,
        revision: str | None,
        private: bool | None,
        message: str,
    ) -> Publication:
        """Make what is missing, then one commit."""
        api, repo_id = self.api, self.repo_id
        head = place.head
        if not place.exists:
            self._asked(lambda: api.create_repo(repo_id, private=private, exist_ok=True), "create it")
        if revision not in (None, "main") and not place.branch:
            self._asked(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True), f"branch {revision!r}")

        def commit() -> Any:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=files,
                revision=revision,
                commit_message=message,
                # Whoever else committed in the meantime is not overwritten, nor is a commit made twice.
                parent_commit=head,
            )

        done = self._asked(commit, "upload to it")
        return Publication(repo_id, f"{api.endpoint}/{repo_id}", done.oid, done.commit_url)

    def _asked(self, ask: Callable[[], _Answer], what: str) -> _Answer:
        """The hub's answer; asked again where it says that it is busy or broken, or the connection is cut.

        The client itself asks again while it sends large files, but not for the rest.
        """
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where = f"hub repository {self.repo_id!r}" if self.repo_id else "hub"
        failures: tuple[type[Exception], ...] = (RuntimeError, *client_errors())
        for attempt in range(1, _TRIES + 1):
            try:
                return ask()
            except LocalTokenNotFoundError:
                raise
            except failures as raised:
                # A large file's failure comes wrapped in a RuntimeError.
                error = raised.__cause__ if type(raised) is RuntimeError else raised
                if what == "look it up" and isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                    raise
                if isinstance(error, HfHubHTTPError):
                    status = error.response.status_code if error.response is not None else 0
                    if status not in _FOR_A_WHILE or attempt == _TRIES:
                        raise StitchError(_in_words(status, where, what, error)) from raised
                elif not isinstance(error, client_errors()):
                    raise
                elif attempt == _TRIES:
                    raise SourceError(
                        f"The {where} cannot be reached (to {what}): {first_lines(error)}. Check the connection and "
                        f"try again; what has arrived is not sent again."
                    ) from raised
                wait = _wait(error, attempt)
            warnings.warn(f"The {where} did not answer (to {what}); asking again in {wait:.0f} s.", stacklevel=4)
            time.sleep(wait)
        raise AssertionError("unreachable")


def _wait(error: Any, attempt: int) -> float:
    """Seconds: as the hub asks for, else 1, 2, 4."""
    response = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else 2.0 ** (attempt - 1), _LONGEST_WAIT)


def _in_words(status: int, where: str, what: str, error: Exception) -> str:
    advice = {
        401: "The token is not valid: log in with `hf auth login`, or set HF_TOKEN.",
        403: "Your token may not write there: check the name, and that the token has the right to write.",
        404: "It is not there, or not yours to see.",
        409: "It changed in the meantime: try again.",
        412: "Somebody else committed to it in the meantime: look at it, and try again.",
        429: "It asks to wait for longer: try again later.",
    }.get(status, "Try again later." if status >= 500 else "")
    return f"The {where} refused to {what} (status {status}). {advice} ({first_lines(error)})".replace("  ", " ")
