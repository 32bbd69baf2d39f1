"""Single files of a hub repository, with a clear error at once where they cannot be had."""

from __future__ import annotations

import errno
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torch import hub

from lightning_stitch.errors import SourceError, first_lines

_TRIES = 4
_LONGEST_WAIT = 60.0
# Too many requests, and what is wrong with a server for a while.
_FOR_A_WHILE = (429, 500, 502, 503, 504)

# Seconds. A hub that let a question wait is not asked again at once: dozens of questions would each wait as long.
_SLOW, _REST = 1.0, 60.0
# By the address of the hub: when the last question failed, and how.
_failed: dict[str, tuple[float, Exception]] = {}

# What the disk of the cache says, not the network.
_LOCAL = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EFBIG}
)

_Answer = TypeVar("_Answer")


def find_hub_file(repo: str, filename: str, *, revision: str | None = None, beside: Sequence[str] = ()) -> WeightFile:
    """Find a file of a hub repository without downloading it.

    One request, asked again only where the hub says that it is busy or broken: `hf_hub_download` and timm ask a dead
    network for up to 49 seconds.

    Args:
        repo: "ORG/NAME".
        filename: A file at the top of the repository.
        revision: Branch, tag or commit; None: the default branch.
        beside: Other files that will be wanted; the advice of an error has them, too.

    Returns:
        The file with its size and the commit that the revision means: the hub's word, or the local cache's where the
        hub cannot be asked.

    Raises:
        SourceError: If the repository, the revision or the file does not exist, or the hub cannot be reached and the
            file is not in the cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable = client_errors()
    try:
        url = hf_hub_url(repo, filename, revision=revision)
        waits = constants.HF_HUB_ETAG_TIMEOUT
        metadata = _asked(
            url, lambda: get_hf_file_metadata(url, timeout=waits), f"hub repository {repo!r}", f"look up {filename}"
        )
        commit = metadata.commit_hash or revision or "main"  # a mirror may not tell the commit
        cached = try_to_load_from_cache(repo, filename, revision=commit)
        return WeightFile(
            file=Path(cached) if isinstance(cached, str) else None,
            folder=Path(constants.HF_HUB_CACHE),
            size=metadata.size,
            hub=(repo, filename, commit),
            sha256=_sha256_of_tag(metadata.etag),
        )
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is no name of a hub repository ({error}).") from error
    except GatedRepoError as error:
        raise SourceError(
            f"hub repository {repo!r} is gated. Ask for access on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub has no repository {repo!r} that you may see. Check the spelling; if it is private, log in with "
            f"`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        short = re.fullmatch("[0-9a-f]{4,39}", revision or "")
        hint = " A commit is given by all 40 digits of its hash." if short else ""
        raise SourceError(f"hub repository {repo!r} has no revision {revision!r}.{hint}") from error
    except EntryNotFoundError as error:
        raise SourceError(
            f"hub repository {repo!r} has no file {filename} at revision {revision or 'main'!r}. timm's layout has "
            f"config.json and model.safetensors; pickled weights are never read, because they can carry code."
        ) from error
    except unreachable as error:
        reason = "HF_HUB_OFFLINE is set" if offline() else f"the hub cannot be reached ({first_lines(error)})"
        refused = status_of(error) in (401, 403)
        if refused:
            reason = f"the hub refuses your token (status {status_of(error)})"
        cached = try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
            # the cache names the folder of a snapshot after its commit
            found = (repo, filename, file.parent.name)
            return WeightFile(file, Path(constants.HF_HUB_CACHE), file.stat().st_size, hub=found, unreachable=reason)
        command = _command(repo, [filename, *beside], revision)
        mend = "Log in with `hf auth login`, or unset HF_TOKEN" if refused else f"Get it with a connection, `{command}`"
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) is not in the local cache, and "
            f"{reason}. {mend}; or give a folder: 'local-dir:PATH'."
        ) from error


def _asked(url: str, ask: Callable[[], _Answer], where: str, what: str) -> _Answer:
    """The hub's answer; where it has just failed, that failure at once, or after one more try.

    A hub that gave no answer within a second is left alone for a minute. One that said that it is busy is asked once,
    and not patiently.
    """
    address = urlsplit(url).netloc
    began = time.monotonic()
    failed_at, failure = _failed.get(address, (-_REST, None))
    fresh = failure is not None and began - failed_at < _REST and not offline()
    if fresh and failure is not None and not status_of(failure):
        raise failure.with_traceback(None)
    try:
        answer = ask() if fresh else patiently(ask, where, what)
    except client_errors() as error:
        slow = time.monotonic() - began > _SLOW
        if status_of(error) in _FOR_A_WHILE or (slow and not status_of(error)):
            _failed[address] = (time.monotonic(), error)
        raise
    _failed.pop(address, None)
    return answer


def tensor_shapes(file: WeightFile) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the tensors in a safetensors file: from its first bytes, on disk or on the hub.

    Returns:
        None where it is no safetensors file, or the hub does not say.

    Raises:
        SourceError: If the file is damaged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError
    from safetensors import SafetensorError, safe_open

    try:
        if file.file is not None and file.file.suffix == ".safetensors":
            with safe_open(str(file.file), framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (no dict)
        if file.file is None and file.hub is not None:
            repo, filename, commit = file.hub
            header = HfApi().parse_safetensors_file_metadata(repo, filename, revision=commit)
            return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    except (SafetensorError, SafetensorsParsingError) as error:
        raise SourceError(
            f"{file.file or ' of '.join(file.hub[1::-1])} is no safetensors file, or damaged "  # type: ignore[index]
            f"({first_lines(error)}). Download it again."
        ) from error
    except client_errors():
        return None
    return None


def hub_file(
    repo: str,
    filename: str,
    *,
    revision: str | None = None,
    beside: Sequence[str] = (),
    size: int | None = None,
    most: int | None = None,
) -> Path:
    """Download a file of a hub repository, or take it from the local cache where the hub cannot be reached.

    Args:
        repo: "ORG/NAME".
        filename: A file at the top of the repository.
        revision: Branch, tag or commit; None: the default branch.
        beside: As `find_hub_file`.
        size: Its bytes; a file that the hub says is of another size is not downloaded. None: any.
        most: Bytes that it may have; a file that the hub says is larger is not downloaded. None: any number.

    Returns:
        The file in the local cache, which keeps it in a folder that is named after its commit.

    Raises:
        SourceError: As `find_hub_file`, if it is of another size or too large, if the download breaks or the cache
            cannot be written, or if it brings other bytes than the hub has.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    found = find_hub_file(repo, filename, revision=revision, beside=beside)
    if size is not None and found.size not in (None, size):
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) has {found.size} bytes; expected "
            f"were {size}. It is another file, or was not uploaded whole."
        )
    if most is not None and found.size is not None and found.size > most:
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) has {found.size} bytes; expected "
            f"were {most} at most. It is not what its name says; look at it on the repository's page."
        )
    if found.file is not None:
        return found.file
    failures: tuple[type[Exception], ...] = (EntryNotFoundError, *client_errors())
    where, what = f"hub repository {repo!r}", f"download {filename}"
    try:
        # by the user's revision, not the commit: so the cache learns what "main" means, for the day without a network
        path = Path(patiently(lambda: hf_hub_download(repo, filename, revision=revision), where, what))
    except failures as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise SourceError(
                f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) could not be written to "
                f"the cache {constants.HF_HUB_CACHE}: {first_lines(error)}. Make room or let it be written there, or "
                f"let HF_HOME (or HF_HUB_CACHE) name another folder."
            ) from error
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) could not be downloaded: "
            f"{first_lines(error)}. Check the connection and try again."
        ) from error
    if found.sha256 is not None and sha256_of(path) != found.sha256:
        path.resolve().unlink()  # or the cache would give it the next time
        path.unlink()
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) did not arrive as the hub has it "
            f"(its sha256 is not {found.sha256[:12]}...). It was deleted from the cache; try again."
        )
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def patiently(ask: Callable[[], _Answer], where: str, what: str, *, also: tuple[type[Exception], ...] = ()) -> _Answer:
    """The hub's answer; asked again where it says that it is busy or broken.

    The client itself asks again while it sends and fetches large files, but not for the rest.

    Args:
        ask: Asks the hub.
        where: Whom, for the warning.
        what: What for.
        also: What to ask again after besides, such as connections that were cut.

    Raises:
        Exception: What the last of four tries raised.
    """
    from huggingface_hub.errors import HfHubHTTPError

    failures: tuple[type[Exception], ...] = (RuntimeError, HfHubHTTPError, *also)
    for attempt in range(1, _TRIES + 1):
        try:
            return ask()
        except failures as raised:
            # A large file's failure comes wrapped in a RuntimeError.
            error: Any = raised.__cause__ if type(raised) is RuntimeError else raised
            busy = isinstance(error, HfHubHTTPError) and status_of(error) in _FOR_A_WHILE
            cut = isinstance(error, also) and not isinstance(error, HfHubHTTPError)
            if attempt == _TRIES or not (busy or cut):
                raise
            wait = _wait(error, attempt)
        warnings.warn(f"The {where} did not answer (to {what}); asking again in {wait:.0f} s.", stacklevel=4)
        time.sleep(wait)
    raise AssertionError("unreachable")


def status_of(error: Any) -> int:
    """What the hub answered; 0: nothing."""
    response = getattr(error, "response", None)
    return 0 if response is None else int(response.status_code)


def _wait(error: Any, attempt: int) -> float:
    """Seconds: as the hub asks for, else 1, 2, 4."""
    response = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else 2.0 ** (attempt - 1), _LONGEST_WAIT)


def _sha256_of_tag(etag: str | None) -> str | None:
    """What the hub names a large file by; a small one has git's name, which is shorter."""
    return etag if etag is not None and re.fullmatch("[0-9a-f]{64}", etag) else None


def _command(repo: str, filenames: Sequence[str], revision: str | None) -> str:
    """What to type to get files into the cache."""
    command = " ".join(["hf download", repo, *filenames, *(["--revision", revision] if revision else [])])
    return f"HF_HUB_OFFLINE=0 {command}" if offline() else command


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for transport and HTTP failures.

    Its transport errors moved from requests (OSErrors) to httpx (not OSErrors); the bases of its own error class name
    the right family in each version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights, on disk or still to be downloaded.

    Attributes:
        file: Where it is; None: it has to be downloaded.
        folder: The folder, which may not exist yet, that it is in or would come to.
        size: Its bytes; None where nobody has been asked.
        hub: Repository, file name and commit, where it comes from the hub.
        url: Where else it comes from.
        unreachable: Why the network could not be asked about it; None: it was asked, or need not be.
        sha256: Of its bytes, where the hub tells.
    """

    file: Path | None
    folder: Path
    size: int | None = None
    hub: tuple[str, str, str] | None = None
    url: str | None = None
    unreachable: str | None = None
    sha256: str | None = None


def offline() -> bool:
    """Whether the user told Hugging Face's client, and so everything here, to stay off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download_of(url: str) -> WeightFile:
    """The file that torch.hub keeps of a URL's weights; the network is not asked.

    Raises:
        SourceError: If it is not cached and the user asked to stay offline.
    """
    file = Path(hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        return WeightFile(file, file.parent, file.stat().st_size, url=url)
    if offline():
        raise SourceError(
            f"its weights are not in the local cache ({file}) and HF_HUB_OFFLINE is set. Get them once with a "
            f"connection: `curl -L --create-dirs -o {file} {url}`; or take pretrained=False for random weights."
        )
    return WeightFile(None, file.parent, url=url)
