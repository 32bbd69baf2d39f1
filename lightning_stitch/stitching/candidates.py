"""What a search handles: running networks, the stitches that may continue them, and the candidates they end as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_stitch.cost import Cost
from lightning_stitch.recipe import Recipe, StitchSpec
from lightning_stitch.stitching.stitches import Stitch

Kind = Literal["source", "self-stitched", "early exit", "stitched"]


@dataclass(frozen=True, slots=True)
class Step:
    """Pieces [first, last) of one source, entered through a stitch; None: from the image.

    The stitch runs as a layer of its own here; its spec says where the assembled network will have it. `tensors` are
    those of the source's parameters and buffers, by name, that have other numbers in this network.
    """

    source: int
    first: int
    last: int
    stitch: Stitch | None = field(default=None, repr=False)
    spec: StitchSpec | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete network that the search proposes.

    Attributes:
        recipe: Its structure, with the search's scores.
        kind: An unmodified source, a source stitched to itself at each of its cuts, a source that ends early, or a
            StitchNet.
        steps: What it runs, for the sources at hand.
        cost: Its parameters and MACs, and its latency by estimate, stitches and folds included.
        pool: What averages the last step's output over its positions; None: it ends where networks end.
    """

    recipe: Recipe
    kind: Kind
    steps: tuple[Step, ...]
    cost: Cost
    pool: nn.Module | None = field(default=None, repr=False)

    @property
    def cka_product(self) -> float:
        """Product of the CKAs of its stitches."""
        return self.recipe.scores["cka_product"]
