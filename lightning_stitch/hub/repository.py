"""A hub repository to write to: what it holds, one commit, and the client's errors in words that help."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning_stitch.errors import SourceError, StitchError, first_lines
from lightning_stitch.hub.folder import CARD
from lightning_stitch.io import client_errors, offline, status_of

_Answer = TypeVar("_Answer")

_ADVICE = {
    401: "The token is not valid: log in with `hf auth login`, or set HF_TOKEN.",
    403: "Your token may not write there: check the name, and that the token has the right to write.",
    404: "It is not there, or not yours to see.",
    412: "Somebody else committed to it in the meantime: look at it, and try again.",
}

# What becomes of a README.md that is there.
ExistingCard = Literal["refuse", "keep", "replace"]


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a network was published.

    Attributes:
        url: The repository's page.
        commit: The commit's hash; "ORG/NAME@COMMIT" loads this very network.
        space: The page of the Space that shows it; None: there is none.
    """

    url: str
    commit: str
    space: str | None = None


@dataclass(frozen=True, slots=True)
class RepositoryState:
    """What a repository holds before it is written to: whether it has the revision and a README.md.

    `head` is the commit of the revision, or of main; None: there is no such repository.
    """

    has_branch: bool
    head: str | None
    has_card: bool


class HubRepository:
    """One repository on the hub; what the client raises comes in words that help, and never with the token.

    The arguments are those of `publish`; a token that cannot be one is refused.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        existing_card: ExistingCard = "refuse",
        repo_type: Literal["model", "space"] = "model",
    ) -> None:
        from huggingface_hub import HfApi, get_token

        self.api = HfApi(token=_clean_token(token or get_token()), library_name="lightning-stitch")
        self.repo_id = repo_id
        self.revision = revision
        self.private = private
        self.existing_card = existing_card
        self.repo_type = repo_type

    def check(self) -> RepositoryState:
        """Refuse all that can be refused before there is anything to publish."""
        if offline():
            raise StitchError("HF_HUB_OFFLINE is set, and publishing needs the hub. Unset it first.")
        if self.api.token is None:
            raise StitchError("The hub needs to know who publishes: log in with `hf auth login`, or set HF_TOKEN.")
        user: dict[str, Any] = self._ask(self.api.whoami, "ask the hub who you are")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise StitchError("Your token may only read. Make one that may write, and log in with it: `hf auth login`.")
        state, owner = self._look_up(), self.repo_id.partition("/")[0]
        names = [str(user.get("name")), *(str(org.get("name")) for org in user.get("orgs", []))]
        if state.head is None and owner not in names:
            raise StitchError(
                f"{self.repo_id!r} does not exist, and you cannot make it: {owner!r} is neither you nor an "
                f"organisation of yours ({', '.join(sorted(names))})."
            )
        return state

    def _look_up(self) -> RepositoryState:
        """What the repository holds, if it may be written to."""
        at_revision = self._ask(lambda: self._info(self.revision), "look it up")
        info = at_revision or self._ask(lambda: self._info(None), "look it up")
        if info is None:
            return RepositoryState(has_branch=False, head=None, has_card=False)
        if self.private is not None and bool(info.private) != self.private:
            is_, wanted = ("private", "public") if info.private else ("public", "private")
            raise StitchError(
                f"{self.repo_id!r} is there and {is_}; private={self.private} asks for a {wanted} one. Take another "
                f"name, or change it on its page first."
            )
        # A branch that is made now begins as a copy of main.
        has_card = any(file.rfilename == CARD for file in info.siblings or [])
        if has_card and self.existing_card == "refuse":
            raise StitchError(
                f"{self.repo_id!r} already has a {CARD}. existing_card='replace' puts the new card there, "
                f"existing_card='keep' leaves it as it is."
            )
        return RepositoryState(has_branch=at_revision is not None, head=info.sha, has_card=has_card)

    def _info(self, revision: str | None) -> Any:
        """What the hub has at a revision; None: nothing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            return self.api.repo_info(self.repo_id, revision=revision, repo_type=self.repo_type)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    def check_card(self, path: Path) -> None:
        """Have the hub look at a card's metadata, which it would refuse with the commit."""
        from huggingface_hub import RepoCard

        content = path.read_text(encoding="utf-8")
        self._ask(lambda: RepoCard(content).validate(self.repo_type), f"take the metadata of {CARD}")

    def upload(self, folder: Path, files: list[str], state: RepositoryState, message: str) -> Publication:
        """Make what is missing, then one commit."""
        from huggingface_hub import CommitOperationAdd

        api, repo_id, revision, kind = self.api, self.repo_id, self.revision, self.repo_type
        if state.head is None:
            new: dict[str, Any] = {"private": self.private, "space_sdk": "gradio" if kind == "space" else None}
            self._ask(lambda: api.create_repo(repo_id, repo_type=kind, exist_ok=True, **new), "create it")
            # Somebody else may have made it since, with a card.
            state = self._look_up()
        if state.has_card and self.existing_card == "keep":
            files = [name for name in files if name != CARD]
        if revision not in (None, "main") and not state.has_branch:
            branch: dict[str, Any] = {"branch": str(revision), "repo_type": kind}
            self._ask(lambda: api.create_branch(repo_id, exist_ok=True, **branch), f"branch {revision!r}")
        # Not upload_folder, which may make several commits of one call.
        added = [CommitOperationAdd(name, folder / name) for name in files if (folder / name).exists()]
        # With its parent named, the commit overwrites nobody else's of the meantime.
        commit = self._ask(
            lambda: api.create_commit(
                repo_id, added, repo_type=kind, revision=revision, commit_message=message, parent_commit=state.head
            ),
            "upload to it",
        )
        return Publication(f"{api.endpoint}/{'spaces/' * (kind == 'space')}{repo_id}", commit.oid)

    def _ask(self, request: Callable[[], _Answer], purpose: str) -> _Answer:
        """The hub's answer; what the client raises comes in words, without the token that may stand in it."""
        from huggingface_hub.errors import HfHubHTTPError

        where = f"{'Space' if self.repo_type == 'space' else 'hub repository'} {self.repo_id!r}"
        failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, *client_errors())
        try:
            return request()
        except failures as raised:
            # A large file's failure comes wrapped in a RuntimeError.
            error = raised.__cause__ if type(raised) is RuntimeError and raised.__cause__ else raised
            token = self.api.token
            tells_token = bool(token) and str(token) in f"{raised} {error}"
            shown = f"{type(error).__name__}, with the token in it" if tells_token else first_lines(error)
            if isinstance(error, HfHubHTTPError):
                status = status_of(error)
                advice = _ADVICE.get(status, "Try again later." if status >= 409 else "See its page.")
                problem = StitchError(f"The {where} refused to {purpose} (status {status}). {advice} ({shown})")
            elif isinstance(error, ValueError):
                # The client's own word for a card that is refused, and for an answer that it cannot read.
                problem = StitchError(f"The {where} refused to {purpose}: {shown}.")
            else:
                problem = SourceError(f"The {where} cannot be reached (to {purpose}): {shown}. Try again later.")
            # A traceback shows the cause as well.
            raise problem from (None if tells_token else raised)


def _clean_token(token: str | None) -> str | None:
    """A token as it can be sent, without the space around it that a file of it may have."""
    token = (token or "").strip()
    # Characters that RFC 6750 does not allow would fail in the client, which then shows them.
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]*", token):
        raise StitchError(
            "The hub's token holds characters that no token has (spaces, line ends, quotes or letters beyond ASCII); "
            "it is not shown here. Copy it again from your settings on the hub, or log in with `hf auth login`."
        )
    return token or None
