"""What a search proposes: complete networks, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_stitch.cost import Cost
from lightning_stitch.io import key_of, tensors_hash
from lightning_stitch.recipe import Recipe, StitchSpec
from lightning_stitch.stitching.stitches import Stitch

Kind = Literal["source", "self-stitched", "early exit", "stitched"]


@dataclass(frozen=True, slots=True)
class Step:
    """Pieces [first, last) of one source, entered through a stitch.

    Attributes:
        source: Place of the source among those at hand.
        first: Its first piece that runs.
        last: Its first piece that does not.
        stitch: What it is entered through, which runs as a layer of its own here; None: it begins at the image, or goes
            on in its source.
        spec: Where the assembled network will have the stitch.
        tensors: Those of the source's parameters and buffers, by name, that have other numbers in this network.
        key: The same for steps of the same numbers, in any process: a hash of those that are not its source's, the
            stitch's and `tensors`; "" where there are none.
    """

    source: int
    first: int
    last: int
    stitch: Stitch | None = field(default=None, repr=False)
    spec: StitchSpec | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash the numbers."""
        state = {} if self.stitch is None else self.stitch.state_dict()
        tensors = dict(sorted(self.tensors.items()))
        names = [[*state], [*tensors]]
        key = key_of(names, tensors_hash([*state.values(), *tensors.values()])) if state or tensors else ""
        object.__setattr__(self, "key", key)


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
    def key(self) -> str:
        """The same for candidates that compute the same of the sources at hand, in any process."""
        steps = [(step.source, step.first, step.last, step.key) for step in self.steps]
        return key_of(steps, self.pool is not None)

    @property
    def cka_product(self) -> float:
        """Product of the CKAs of its stitches."""
        return self.recipe.scores["cka_product"]
