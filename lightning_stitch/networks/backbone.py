"""A stitched network as the backbone of any module: images in, vectors of the width that the module expects out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.hub import structure_of, warn_of_changes
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import Recipe

_STATE = "_extra_state"
_FORMAT = "lightning_stitch.StitchedBackbone"
HOOK = "on_backbone_stitched"
"""Name of the method that a module may have, to be told of a backbone: `on_backbone_stitched(self, backbone)`."""


class StitchedBackbone(nn.Module):
    """A place for a stitched network in a module of your own, where its backbone stood.

    It is empty until `FragmentSearch(attribute=...)` fills it, or until a state dict is loaded: the recipe is part of
    the state dict (plain values, as `weights_only=True` demands), so that checkpoints need nothing else.

    Takes images (batch, channels, height, width), float, and gives vectors (batch, num_features). The network stays in
    eval mode while it trains, so that a head that was fitted to its features goes on fitting them.

    Args:
        num_features: Width of the vectors. A network of another width gets a linear layer behind it. None: as wide as
            the network; the module must then have a method `on_backbone_stitched(self, backbone)`, which is called
            before `configure_optimizers` and can build what depends on `backbone.num_features`.
        mean: What the images that come in were normalised with, per channel; undone here. None: they are in [0, 1].
        std: Likewise.
        recipe: A recipe's `to_dict()`: the structure, with random weights, where it is known from the start.
        trust_factory: Allow a recipe to import and call the factory of a "python:" source.
        train_mode: Whether the network follows `train()`, as other modules do.

    Attributes:
        network: The stitched network; None: there is none yet.
        projection: The linear layer to `num_features`; None: the network's own width is right.
        head_attribute: Where in the module a search fitted the linear layer behind it, by dotted name; None: nowhere.

    Raises:
        RecipeError: If a recipe is malformed or cannot be built.
        StitchError: If `mean` and `std` do not belong together.

    Example:
        >>> backbone = StitchedBackbone(num_features=512)
        >>> head = nn.Linear(backbone.num_features, 10)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        recipe: dict[str, Any] | None = None,
        trust_factory: bool = False,
        train_mode: bool = False,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or min(std or (1.0,)) <= 0:
            raise StitchError(f"mean and std belong together, one positive std for each mean; found {mean} and {std}.")
        self.trust_factory = trust_factory
        self.train_mode = train_mode
        self.network: StitchedNetwork | None = None
        self.projection: nn.Linear | None = None
        self.head_attribute: str | None = None
        self._width = num_features
        # Not in the state dict, where the extra state has them; buffers, to be where the module is.
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(1, -1, 1, 1), persistent=False)
        if recipe is not None:
            network = StitchedNetwork.from_recipe(Recipe.from_dict(recipe), trust_factory=trust_factory)
            width = network.num_features
            self.install(network, None if num_features in (None, width) else nn.Linear(width, int(num_features or 0)))

    @property
    def num_features(self) -> int:
        """Width of the vectors; a `StitchError` where it is not known yet."""
        if self._width is not None:
            return self._width
        if self.network is None:
            raise StitchError(
                "The width of this StitchedBackbone is not known before it has a network. Give "
                f"StitchedBackbone(num_features=...), or define {HOOK}(self, backbone) and use it there."
            )
        return self.network.num_features

    @property
    def announces_width(self) -> bool:
        """Whether the width is the network's, whatever that is."""
        return self._width is None

    @property
    def recipe(self) -> Recipe | None:
        """The structure of the network; None: there is none yet."""
        return None if self.network is None else self.network.recipe

    def install(self, network: StitchedNetwork, projection: nn.Linear | None = None) -> None:
        """Take a network and the linear layer behind it, to the device that the backbone is on."""
        self.network = network.to(self.mean.device)
        self.projection = None if projection is None else projection.to(self.mean.device)
        self.train(self.training)

    def train(self, mode: bool = True) -> StitchedBackbone:
        """Set the mode, the network's only where it is to follow."""
        super().train(mode)
        if self.network is not None and not self.train_mode:
            self.network.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Vectors (batch, num_features) of images."""
        if self.network is None:
            raise StitchError(
                "This StitchedBackbone has no network yet. Put FragmentSearch(attribute=...) among the Trainer's "
                "callbacks and call fit, load a checkpoint, or give a recipe."
            )
        features: Tensor = self.network(images * self.std + self.mean)
        return features if self.projection is None else self.projection(features)

    def get_extra_state(self) -> dict[str, Any]:
        """The structure, as plain dicts, lists, strings and numbers."""
        return {
            "format": _FORMAT,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            **({} if self.network is None else structure_of(self.network)),
            "num_features": self._width,
            "projected": self.projection is not None,
            "head_attribute": self.head_attribute,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def set_extra_state(self, state: Any) -> None:
        """Nothing is left to do: the structure was built before the tensors were loaded."""

    def take_structure(self, state: Mapping[str, Any]) -> bool:
        """Build the structure that an extra state describes, unless it is here already; says whether it was not."""
        if self._width is not None and state["num_features"] != self._width:
            raise RecipeError(
                f"This StitchedBackbone has num_features={self._width}, that of the checkpoint "
                f"{state['num_features']}. Build the module as it was when the checkpoint was saved."
            )
        self._width, self.head_attribute = state["num_features"], state["head_attribute"]
        self.mean = self.mean.new_tensor(state["mean"]).view(1, -1, 1, 1)
        self.std = self.std.new_tensor(state["std"]).view(1, -1, 1, 1)
        if state["recipe"] is None:
            is_changed = self.network is not None
            self.network = self.projection = None
            return is_changed
        recipe = Recipe.from_dict(state["recipe"])
        if (self.recipe, self.projection is not None) == (recipe, state["projected"]):
            return False
        network = StitchedNetwork.from_recipe(recipe, trust_factory=self.trust_factory)
        warn_of_changes(state, network, "this checkpoint's StitchedBackbone")
        self.install(network, nn.Linear(network.num_features, self.num_features) if state["projected"] else None)
        return True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + _STATE in state_dict:
            self.take_structure(state_dict[prefix + _STATE])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def saved_backbones(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The structures of all stitched backbones of a state dict, by the dotted name of their attribute."""
    return {
        key.removesuffix(f".{_STATE}"): value
        for key, value in state_dict.items()
        if key.endswith(f".{_STATE}") and isinstance(value, dict) and value.get("format") == _FORMAT
    }


def restore_backbones(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module the stitched backbones of a checkpoint, before its tensors are loaded.

    Call it in the module's `on_load_checkpoint`, unless `__init__` makes a `StitchedBackbone` of known width.

    Args:
        module: The module; attributes that the checkpoint has a stitched backbone for are replaced, and
            `on_backbone_stitched` is called where there is such a method.
        checkpoint: A Lightning checkpoint.

    Raises:
        RecipeError: If the module has no such attribute, or a backbone does not fit.

    Example:
        >>> def on_load_checkpoint(self, checkpoint):
        ...     restore_backbones(self, checkpoint)
    """
    for attribute, state in saved_backbones(checkpoint["state_dict"]).items():
        try:
            present = module.get_submodule(attribute)
        except AttributeError as error:
            raise RecipeError(
                f"The checkpoint has a stitched backbone in {attribute!r}, which {type(module).__name__} lacks."
            ) from error
        backbone = present if isinstance(present, StitchedBackbone) else StitchedBackbone()
        is_new = backbone.take_structure(state)
        if backbone is not present:
            put(module, attribute, backbone)
        if is_new:  # what the module built before may be in an optimizer by now
            announce(module, backbone)


def put(module: nn.Module, attribute: str, backbone: StitchedBackbone) -> None:
    """Set a module's attribute, by dotted name; the backbone goes to the mode of what it replaces."""
    parent, _, name = attribute.rpartition(".")
    backbone.train(module.get_submodule(attribute).training)
    setattr(module.get_submodule(parent), name, backbone)


def announce(module: nn.Module, backbone: StitchedBackbone) -> None:
    """Call the module's `on_backbone_stitched`, if it has one."""
    getattr(module, HOOK, lambda backbone: None)(backbone)
