"""Publishing a network on the hub: checked first, written, loaded again and compared, then uploaded as one commit."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from lightning_stitch.cutting import in_eval_mode, reference_tensor
from lightning_stitch.errors import StitchError
from lightning_stitch.hub.card import CardDetails, check_licence, licence_of
from lightning_stitch.hub.folder import CARD, PICTURE
from lightning_stitch.hub.repository import ExistingCard, HubRepository, Publication
from lightning_stitch.hub.saving import check_rebuildable
from lightning_stitch.hub.space import SPACE_FILES, write_space
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
    space: bool = False,
) -> Publication:
    """Publish a network on the hub, in one commit; the repository is made if it does not exist.

    The sources' licences, your right to write there and a README.md that is there are checked first. Then the folder of
    `save_pretrained` is written in a temporary place, loaded again, and both networks' outputs are compared. Only then
    it is uploaded. What fails on the way leaves the revision as it was; a second call sends only what had not arrived.

    Args:
        network: A `StitchedClassifier` with a network, or a `StitchedNetwork`, also what `torch.compile` made of one.
        repo_id: "ORG/NAME" on the hub.
        private: Whether the repository is, or has to be, private; None: as it is, or the hub's default.
        revision: A branch; it is made if it does not exist. None: "main".
        details: What the card says beyond the recipe, licences too.
        existing_card: What becomes of a README.md that is there: "refuse" (nothing is published), "keep" or "replace".
        commit_message: Of the commit.
        token: Of the hub; None: that of `hf auth login` or HF_TOKEN.
        space: Of a classifier also publish a Space of the same name, whose page predicts with this commit of it
            (`lightning_stitch.app`). It is as private as the network, which it then needs a token in its secrets for.

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
    check_destination(repo_id, existing_card)
    check_publishable(network, details)
    hub = HubRepository(repo_id, token=token, revision=revision, private=private, existing_card=existing_card)
    place = hub.check()
    if space and getattr(network, "task", None) != "multiclass":
        raise StitchError("A Space shows a classifier, with classes rather than features, labels or numbers.")
    shown = HubRepository(repo_id, token=token, private=private, existing_card=existing_card, repo_type="space")
    place_of_space = shown.check() if space else None
    with tempfile.TemporaryDirectory(prefix="lightning-stitch-") as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        network.save_pretrained(folder, details=details, name=repo_id)  # type: ignore[operator]
        _check_reloaded(network, folder)
        # Before a repository is made that nothing would come into.
        hub.check_card(folder / CARD)
        published = hub.upload(folder, _FILES, place, commit_message)
        if place_of_space is None:
            return published
        word = details.licence or licence_of(network.recipe)  # type: ignore[arg-type]
        write_space(Path(temporary) / "space", repo_id, published.commit, licence=word)
        page = shown.upload(Path(temporary) / "space", SPACE_FILES, place_of_space, commit_message)
        return dataclasses.replace(published, space=page.url)


def check_destination(repo_id: str, existing_card: str) -> None:
    """Refuse what is no name of a repository, or no word for what becomes of a card."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if existing_card not in get_args(ExistingCard):
        raise StitchError(f"existing_card must be one of {get_args(ExistingCard)}; found {existing_card!r}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise StitchError(f"{repo_id!r} is no name of a hub repository ({error}).") from error
    if "/" not in repo_id:
        raise StitchError(f"A repository is 'ORG/NAME', ORG being you or an organisation; found {repo_id!r}.")


def check_publishable(network: nn.Module, details: CardDetails) -> None:
    """Refuse what has nothing to publish, or may not be published."""
    recipe = getattr(network, "recipe", None)
    if recipe is None or not hasattr(network, "save_pretrained"):
        raise StitchError(
            f"{type(network).__name__} has no recipe, so there is nothing to publish: give a StitchedClassifier that "
            f"has its network (from fit or load_from_checkpoint), or a StitchedNetwork; of a wrapper its .module, of a "
            f"StitchedBackbone its .network."
        )
    check_rebuildable(recipe)
    check_licence(recipe, details)


@torch.no_grad()
def _check_reloaded(network: Any, folder: Path) -> None:
    """Refuse a folder that, loaded, gives other outputs on two seeded images than the network it was made of."""
    tensor = reference_tensor(network)
    reloaded = type(network).from_pretrained(folder, trust_factory=True).to(tensor.device)
    images = torch.rand(2, *network.recipe.input_size, generator=torch.Generator().manual_seed(0)).to(tensor)
    with in_eval_mode(network):
        expected = network(images).float()
    difference = float((reloaded(images).float() - expected).abs().max())
    # Memory of another layout may take other kernels, which round otherwise.
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise StitchError(
            f"The saved network gives other outputs when it is loaded again (largest difference {difference:.3g}), so "
            f"it was not published. Was one of its layers replaced or hooked after it was composed?"
        )
