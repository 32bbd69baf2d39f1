"""Sources taken apart at their cuts, and what their pieces cost, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, fx

from lightning_stitch.cost import Cost
from lightning_stitch.cutting import Cut, CutGraph, fuse
from lightning_stitch.recipe import Statistic
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources import Preprocess, Source, cut_source
from lightning_stitch.stitching.taps import statistics_of

# Below glibc's largest threshold (32 MB) for keeping freed memory instead of giving it back.
_CHUNK_BYTES = 20 * 2**20


@dataclass(slots=True)
class Segmented:
    """A source at one image size, taken apart at its cuts.

    Attributes:
        source: The source.
        graph: Its traced graph at that size.
        cuts: The cuts where the search may leave and enter, in forward order.
        end: Name of the cut where networks end in it; None: its output.
        pieces: One module more than cuts: image to first cut, cut to cut, last cut to end. They share the source's
            parameters.
        costs: Parameters and multiply-accumulates of each piece.
        preprocess: Images in [0, 1] to the source's own view.
        image_shape: (channels, height, width) of these images.
        taps: What is read of each cut that a network passes; None: nothing.
    """

    source: Source
    graph: CutGraph
    cuts: list[Cut]
    end: str | None
    pieces: list[fx.GraphModule]
    costs: list[Cost]
    preprocess: Preprocess
    image_shape: tuple[int, int, int]
    taps: list[tuple[Statistic, ...] | None]
    _fused: list[fx.GraphModule] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def ends(self) -> list[str | None]:
        """Name of the cut before each piece, and behind the last; None: the image, and the output."""
        return [None, *(cut.name for cut in self.cuts), self.end]

    @property
    def fused(self) -> list[fx.GraphModule]:
        """The pieces as a search runs them (`fuse`): with weights of their own, as the source's were at first use."""
        self.fuse()
        return self._fused

    def fuse(self) -> None:
        """Make `fused` now, unless it is there."""
        if not self._fused:
            self._fused = [fuse(piece) for piece in self.pieces]

    @property
    def images_at_once(self) -> int:
        """How many images run fastest together on a CPU.

        Larger tensors than this come from the operating system page by page, each time anew, which costs more than the
        arithmetic: EfficientNet-Lite0 at 224 pixels ran 4 images at a time six times faster than 32.
        """
        return max(1, _CHUNK_BYTES // (4 * self.graph.largest_activation))

    def to(self, device: torch.device) -> None:
        """Move the source's module, and so its pieces, and the preprocessing."""
        for module in (self.source.module, self.preprocess, *self.pieces):
            module.to(device)
        self._fused = []

    def width_at(self, piece: int) -> int:
        """Channels of the activation before a piece, which follows a cut; behind the last one, width of the output."""
        if piece < len(self.pieces):
            return self.cuts[piece - 1].channels
        return self.graph.output_features() if self.end is None else self.graph.find(self.end).channels

    def statistics_at(self, piece: int, *, is_end: bool) -> tuple[Statistic, ...] | None:
        """What is read behind a piece; None: nothing. At the end of a network something is."""
        if piece == len(self.cuts):
            return ()
        average: tuple[Statistic, ...] = () if self.cuts[piece].grid is None else ("mean",)
        return self.taps[piece] if self.taps[piece] is not None or not is_end else average

    def cost_between(self, first: int, last: int) -> Cost:
        """Cost of the pieces from one index up to, not including, another."""
        return sum(self.costs[first:last], Cost(0, 0))

    @property
    def cost(self) -> Cost:
        """Cost of the whole source, up to where networks end."""
        return self.cost_between(0, len(self.pieces))


def chunks(images: Tensor, images_at_once: int) -> Sequence[Tensor]:
    """A batch in parts that run fastest one after the other; on an accelerator in one."""
    return images.split(images_at_once) if images.device.type == "cpu" else (images,)


def segment(
    source: Source, settings: CalibrationSettings, image_shape: tuple[int, int, int], *, resize: bool = False
) -> Segmented:
    """Take a source apart at its cuts for images of a shape, to which they are resized if need be.

    A CutError says that it cannot be cut, has no feature vector to end at, or does not take such images.
    """
    graph, cuts, end = cut_source(source, settings, image_shape)
    pairs = list(pairwise([None, *(cut.name for cut in cuts), end]))
    pieces = [graph.fragment(a, b, share=True).eval() for a, b in pairs]
    tapped = _names_of_taps(graph, cuts, settings)
    return Segmented(
        source=source,
        graph=graph,
        cuts=cuts,
        end=end,
        pieces=pieces,
        costs=[Cost(sum(p.numel() for p in graph.parameters(a, b)), graph.macs(a, b)) for a, b in pairs],
        preprocess=Preprocess(source.preprocessing, image_shape[1:] if resize else None),
        image_shape=image_shape,
        taps=[statistics_of(cut) if cut.name in tapped else None for cut in cuts],
    )


def _names_of_taps(graph: CutGraph, cuts: Sequence[Cut], settings: CalibrationSettings) -> set[str]:
    """The cuts of a source that are read when a network passes them."""
    offered = {cut.name for cut in cuts}
    if settings.until == "output" or settings.readout == "last":
        return set()
    if settings.readout == "all":
        return offered & {cut.name for cut in graph.cuts("blocks")} or offered
    return offered & set(settings.readout)
