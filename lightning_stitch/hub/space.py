"""A Space on the hub: a page that predicts with a published classifier."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_stitch import __version__
from lightning_stitch.hub.folder import CARD
from lightning_stitch.sources import hub_words

_APP, _REQUIREMENTS = "app.py", "requirements.txt"
SPACE_FILES = [_APP, _REQUIREMENTS, CARD]


def write_space(folder: Path, repo_id: str, commit: str, *, licence: str | None) -> None:
    """Write app.py, requirements.txt and README.md of a Space that shows a classifier of the hub.

    Args:
        folder: Where to; made if it is not there.
        repo_id: "ORG/NAME" of the classifier.
        commit: The commit of it that is shown.
        licence: The classifier's, in the hub's words; None: other.
    """
    from huggingface_hub.utils import yaml_dump

    folder.mkdir(parents=True, exist_ok=True)
    where = json.dumps(f"{repo_id}@{commit}")
    (folder / _APP).write_text(
        "from lightning_stitch import StitchedClassifier\n"
        "from lightning_stitch.app import demo_of, serve\n\n"
        f"serve(demo_of(StitchedClassifier.from_pretrained({where})))\n",
        encoding="utf-8",
    )
    (folder / _REQUIREMENTS).write_text(f"lightning-stitch[app]=={__version__}\n", encoding="utf-8")
    word, name = hub_words(licence)
    about = {
        "title": repo_id.rpartition("/")[2],
        "sdk": "gradio",
        "sdk_version": _version_of("gradio"),
        "app_file": _APP,
        "models": [repo_id],
        "license": word,
        "license_name": name,
    }
    header = yaml_dump({key: value for key, value in about.items() if value is not None})
    (folder / CARD).write_text(f"---\n{header}---\n\nPredicts images with [{repo_id}].\n", encoding="utf-8")


def _version_of(package: str) -> str | None:
    """The release that is installed here; None: none is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
