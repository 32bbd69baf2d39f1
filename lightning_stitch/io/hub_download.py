"""Single files of a hub repository, with a clear error at once where they cannot be had."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import hub

from lightning_stitch.errors import SourceError, first_lines
from lightning_stitch.io.tensor_files import check_content

# The files of a network, in timm's layout and in ours.
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_CONFIG = 16 * 2**20  # bytes; a stranger may have put anything under its name


def split_repository(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of "ORG/NAME" or "ORG/NAME@REVISION"; None: it is neither."""
    match = re.fullmatch("([^/@]+/[^/@]+)(?:@(.+))?", text)
    return None if match is None else (match[1], match[2])


def find_hub_file(repo: str, filename: str, *, revision: str | None = None, beside: Sequence[str] = ()) -> WeightFile:
    """Find a file at the top of a hub repository "ORG/NAME", with its size and commit, without downloading it.

    A hub that cannot be reached is asked once, since the client would ask a dead network for up to 49 seconds; the
    local cache then answers. One that is busy or broken is asked again by the client's own rules, unless the cache has
    the file.

    Args:
        repo: "ORG/NAME".
        filename: A file at the top of the repository.
        revision: Branch, tag or commit; None: the default branch.
        beside: Other files that will be wanted; the advice of an error has them, too.

    Raises:
        SourceError: If it does not exist, or the hub cannot be reached and the file is not in the cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable, folder = client_errors(), Path(constants.HF_HUB_CACHE)
    try:
        url = hf_hub_url(repo, filename, revision=revision)
        try:
            metadata = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError as error:
            cached = try_to_load_from_cache(repo, filename, revision=revision)
            if isinstance(cached, str) or (status_of(error) < 500 and status_of(error) not in (408, 429)):
                raise
            metadata = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)
        commit = metadata.commit_hash or revision or "main"  # a mirror may not tell the commit
        cached = try_to_load_from_cache(repo, filename, revision=commit)
        return WeightFile(
            file=Path(cached) if isinstance(cached, str) else None,
            folder=folder,
            size=metadata.size,
            hub=(repo, filename, commit),
            # What the hub names a large file by; a small one has git's name, which is shorter.
            sha256=metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None,
        )
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is no name of a hub repository ({error}).") from error
    except RepositoryNotFoundError as error:  # or it is gated
        raise SourceError(
            f"the hub has no repository {repo!r} that you may see. Check the spelling; if it is private or gated, ask "
            f"for access on its page, then log in with `hf auth login`."
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
        command = ["HF_HUB_OFFLINE=0"] * offline() + ["hf download", repo, filename, *beside]
        command += ["--revision", revision] if revision else []
        mend = f"Get it with a connection, `{' '.join(command)}`"
        if (status := status_of(error)) in (401, 403):
            reason = f"the hub refuses your token (status {status})"
            mend = "Log in with `hf auth login`, or unset HF_TOKEN"
        cached = try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
            # The cache names the folder of a snapshot after its commit.
            commit = file.parent.name
            return WeightFile(file, folder, file.stat().st_size, hub=(repo, filename, commit), unreachable=reason)
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) is not in the local cache, and "
            f"{reason}. {mend}; or give a folder: 'local-dir:PATH'."
        ) from error


def tensor_shapes(file: WeightFile) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the tensors in a safetensors file; None: it is another file, or the hub does not say.

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
    most: int | None = None,
) -> Path:
    """Download a file as `find_hub_file` finds it, or take it from the local cache, in a folder named after its commit.

    A file of more than `most` bytes is not downloaded; None: any number.

    Raises:
        SourceError: As `find_hub_file`, if it is too large, or if the download breaks or brings other bytes.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    remote = find_hub_file(repo, filename, revision=revision, beside=beside)
    name = f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r})"
    if most is not None and remote.size is not None and remote.size > most:
        raise SourceError(
            f"{name} has {remote.size} bytes; expected were {most} at most. Look at it on the repository's page."
        )
    if remote.file is not None:
        check_content(remote.file)
        return remote.file
    failures: tuple[type[Exception], ...] = (EntryNotFoundError, RuntimeError, *client_errors())
    try:
        # By the user's revision, not the commit: so the cache learns what "main" means, for the day without a network
        path = Path(hf_hub_download(repo, filename, revision=revision))
    except failures as error:
        raise SourceError(
            f"{name} could not be downloaded: {first_lines(error)}. Check the connection, and the room and rights in "
            f"the cache {constants.HF_HUB_CACHE} (HF_HOME names another one); then try again."
        ) from error
    if remote.sha256 is not None and sha256_of(path) != remote.sha256:
        path.resolve().unlink()  # or the cache would give it the next time
        path.unlink()
        raise SourceError(
            f"{name} did not arrive as the hub has it (its sha256 is not {remote.sha256[:12]}...). It was deleted from "
            f"the cache; try again."
        )
    check_content(path)
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def status_of(error: Any) -> int:
    """What the hub answered; 0: nothing."""
    response = getattr(error, "response", None)
    return 0 if response is None else int(response.status_code)


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for transport and HTTP failures."""
    from huggingface_hub.errors import HfHubHTTPError

    # By the client's version, transport errors are requests' or httpx's, from which its own error class inherits.
    return OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights: `file`, or where that is None to be downloaded, from the hub or a URL.

    `folder`, which may not exist yet, is where it is or would come to, and `hub` the repository, file name and commit.
    Its bytes (`size`) and `sha256` are None where nobody told; `unreachable` says why the network could not be asked.
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
        SourceError: If it is not cached and the user asked to stay offline, or what is cached is another file.
    """
    file = Path(hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        check_content(file)
        return WeightFile(file, file.parent, file.stat().st_size, url=url)
    if offline():
        raise SourceError(
            f"its weights are not in the local cache ({file}) and HF_HUB_OFFLINE is set. Get them once with a "
            f"connection: `curl -L --create-dirs -o {file} {url}`; or take pretrained=False for random weights."
        )
    return WeightFile(None, file.parent, url=url)
