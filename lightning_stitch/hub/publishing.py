"""Publishing a network on the hub: checked first, written, loaded again and compared, then uploaded as one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_stitch.cutting import in_eval_mode
from lightning_stitch.errors import StitchError
from lightning_stitch.hub.card import CardDetails, check_licence, check_whole
from lightning_stitch.hub.folder import CARD, PICTURE
from lightning_stitch.hub.repository import ExistingCard, HubRepository, Publication
from lightning_stitch.hub.saving import check_rebuildable
from lightning_stitch.io import CONFIG, WEIGHTS

_FILES = [CONFIG, WEIGHTS, PICTURE, CARD]


def publish(
    network: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    details: CardDetails | None = None,
    existing_card: ExistingCard = "refuse",
    commit_message: str = "Publish a stitched network",
    token: str | None = None,
) -> Publication:
    """Publish a network on the hub, in one commit; the repository is made if it does not exist.

    Before anything long: is there a network, may it be shared by its sources' licences, may you write there, and would
    a README.md be overwritten? Then the folder of `save_pretrained` is written in a temporary place, loaded again, and
    both networks' outputs compared. Only then it is uploaded; what fails on the way leaves the revision as it was, and
    files that arrived are not sent again by a second call.

    Args:
        network: A `StitchedClassifier` with a network, or a `StitchedNetwork`; also one that
            `torch.compile` gave. It stays as it is.
        repo_id: "ORG/NAME" on the hub.
        private: Whether a repository that is made is private, and one that is there has to be; None: the hub's default,
            or what it is.
        revision: A branch; it is made if it does not exist. None: "main".
        details: What the card says beyond the recipe, licences too.
        existing_card: What becomes of a README.md that is there: nothing is published ("refuse"), it is kept, or it is
            replaced.
        commit_message: Of the commit.
        token: Of the hub; None: that of `hf auth login` or HF_TOKEN.

    Returns:
        Where it is.

    Raises:
        RecipeError: If a source is a live module, which nobody else could build.
        StitchError: If there is nothing to publish, licences forbid it, you may not write there, a README.md or a
            repository of another visibility is in the way, the loaded network differs, or the hub fails.
    """
    details = details or CardDetails()
    # What torch.compile gives wraps the network.
    network = getattr(network, "_orig_mod", network)
    check_publishable(network, repo_id, details, existing_card=existing_card)
    hub = HubRepository(repo_id, token=token, revision=revision, private=private, existing_card=existing_card)
    place = hub.check()
    with tempfile.TemporaryDirectory(prefix="lightning-stitch-") as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        network.save_pretrained(folder, details=details, name=repo_id)  # type: ignore[operator]
        check_reloaded(network, folder)
        # Before a repository is made that nothing would come into.
        hub.check_card(folder / CARD)
        return hub.upload(folder, _FILES, place, commit_message)


def check_publishable(
    network: nn.Module, repo_id: str, details: CardDetails, *, existing_card: ExistingCard = "refuse"
) -> None:
    """What can be refused without the hub.

    Raises:
        RecipeError: As `publish`.
        StitchError: As `publish`, as far as the hub is not asked.
    """
    check_repo_id(repo_id)
    check_existing_card(existing_card)
    if isinstance(getattr(network, "module", None), nn.Module) and not hasattr(network, "recipe"):
        raise StitchError(
            f"{type(network).__name__} spreads a network over devices; give the network that it holds: its .module."
        )
    recipe = getattr(network, "recipe", None)
    if recipe is None or not hasattr(network, "save_pretrained"):
        raise StitchError(
            f"{type(network).__name__} has no recipe, so there is nothing to publish: give a StitchedClassifier that "
            f"has its network (from fit or load_from_checkpoint), or a StitchedNetwork."
        )
    check_rebuildable(recipe)
    check_whole(getattr(network, "class_names", None), "The class names")
    check_licence(recipe, details)


def check_existing_card(existing_card: str) -> None:
    """Refuse what is no word for what becomes of a card.

    Raises:
        StitchError: If it is none.
    """
    if existing_card not in get_args(ExistingCard):
        raise StitchError(f"existing_card must be one of {get_args(ExistingCard)}; found {existing_card!r}.")


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        StitchError: If it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise StitchError(f"{repo_id!r} is no name of a hub repository ({error}).") from error
    if repo_id.count("/") != 1:
        raise StitchError(
            f"A repository is 'ORG/NAME', ORG being your own name or an organisation's; found {repo_id!r}."
        )


@torch.no_grad()
def check_reloaded(network: nn.Module, folder: Path) -> None:
    """Load a saved folder and compare its outputs on two seeded images with those of the network it was made of.

    Raises:
        StitchError: If they differ.
    """
    loaded = type(network).from_pretrained(folder, trust_factory=True)  # type: ignore[attr-defined]
    tensor = next(iter((*network.parameters(), *network.buffers())))
    loaded = loaded.to(tensor.device)
    size = network.recipe.input_size  # type: ignore[union-attr]
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)  # type: ignore[misc]
    with in_eval_mode(network):
        expected: Tensor = network(images).float()
    found: Tensor = loaded(images).float()
    worst = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    # Memory of another layout may take other kernels, which round otherwise.
    if not worst <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise StitchError(
            f"The network that was saved gives other outputs when it is loaded again (largest difference {worst:.3g}), "
            f"so it was not published. Was one of its layers replaced or hooked after it was composed?"
        )
