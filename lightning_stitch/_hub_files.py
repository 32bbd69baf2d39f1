"""Single files of a hub repository, with a clear error at once where they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_stitch._blueprint import WeightFile, first_lines, offline
from lightning_stitch.errors import SourceError


def find_hub_file(repo: str, filename: str, *, revision: str | None = None, beside: Sequence[str] = ()) -> WeightFile:
    """Find a file of a hub repository without downloading it.

    One request without retries: `hf_hub_download` and timm retry a dead network for up to 49 seconds.

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
        metadata = get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision))
        commit = metadata.commit_hash or revision or "main"  # a mirror may not tell the commit
        cached = try_to_load_from_cache(repo, filename, revision=commit)
        return WeightFile(
            file=Path(cached) if isinstance(cached, str) else None,
            folder=Path(constants.HF_HUB_CACHE),
            size=metadata.size,
            hub=(repo, filename, commit),
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
        raise SourceError(f"hub repository {repo!r} has no revision {revision!r}.") from error
    except EntryNotFoundError as error:
        raise SourceError(
            f"hub repository {repo!r} has no file {filename} at revision {revision or 'main'!r}. timm's layout has "
            f"config.json and model.safetensors; pickled weights are never read, because they can carry code."
        ) from error
    except unreachable as error:
        reason = "HF_HUB_OFFLINE is set" if offline() else f"the hub cannot be reached ({first_lines(error)})"
        cached = try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
            # the cache names the folder of a snapshot after its commit
            found = (repo, filename, file.parent.name)
            return WeightFile(file, Path(constants.HF_HUB_CACHE), file.stat().st_size, hub=found, unreachable=reason)
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) is not in the local cache, and "
            f"{reason}. Download it once with a connection, `{_command(repo, [filename, *beside], revision)}`, or give "
            f"a folder: 'local-dir:PATH'."
        ) from error


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


def hub_file(repo: str, filename: str, *, revision: str | None = None, beside: Sequence[str] = ()) -> Path:
    """Download a file of a hub repository, or take it from the local cache where the hub cannot be reached.

    Args:
        repo: "ORG/NAME".
        filename: A file at the top of the repository.
        revision: Branch, tag or commit; None: the default branch.
        beside: As `find_hub_file`.

    Returns:
        The file in the local cache, which keeps it in a folder that is named after its commit.

    Raises:
        SourceError: As `find_hub_file`, or if the download breaks.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    found = find_hub_file(repo, filename, revision=revision, beside=beside)
    if found.file is not None:
        return found.file
    failures: tuple[type[Exception], ...] = (EntryNotFoundError, *client_errors())
    try:
        # by the user's revision, not the commit: so the cache learns what "main" means, for the day without a network
        return Path(hf_hub_download(repo, filename, revision=revision))
    except failures as error:
        raise SourceError(
            f"{filename} of hub repository {repo!r} (revision {revision or 'main'!r}) could not be downloaded: "
            f"{first_lines(error)}. Check the connection and try again."
        ) from error


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
