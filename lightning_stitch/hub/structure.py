"""What the fragments of a saved network do, so that what a source's code has become since then is told, not guessed.

A recipe names cuts; what lies between two of them is found anew in the code of the packages at hand. Weights that still
fit would hide that it does something else by now.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx

from lightning_stitch.hub.folder import BUILDERS
from lightning_stitch.io import differences, in_words, versions


def structure_of(network: Any) -> dict[str, Any]:
    """What each fragment of a `StitchedNetwork` does, node by node, and versions of what builds it; plain JSON."""
    return {"nodes": [_nodes_of(part.graph) for part in network.fragments], "versions": versions(*BUILDERS)}


def warn_of_changes(saved: Any, network: Any, where: str) -> None:
    """Warn where a network does something else than that of which `structure_of` told; of nothing if it did not."""
    if not (
        isinstance(saved, dict) and isinstance(saved.get("nodes"), list) and isinstance(saved.get("versions"), dict)
    ):
        return
    now = structure_of(network)
    for number, (before, here) in enumerate(zip(saved["nodes"], now["nodes"], strict=False)):
        if before == here or not isinstance(before, list):
            continue
        place = next((n for n, pair in enumerate(zip(before, here, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(before), len(here)) if place is None else place
        was, is_now = (str(nodes[place])[:80] if place < len(nodes) else "nothing more" for nodes in (before, here))
        changes = differences(saved["versions"], now["versions"])
        warnings.warn(
            f"Fragment {number} of {where} does something else than when it was saved: its node {place} was {was!r} "
            f"and is {is_now!r} here. Its outputs may differ. "
            + (f"Versions differ: {in_words(changes)}." if changes else "The versions are the same."),
            stacklevel=3,
        )
        return


def _nodes_of(graph: fx.Graph) -> list[str]:
    """Modules by their places in the source, and functions by name, in the order in which they run."""
    return [_name_of(node) for node in graph.nodes if node.op not in ("placeholder", "output")]


def _name_of(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    # This package's own functions may move.
    module = "lightning_stitch" if target.__module__.startswith("lightning_stitch.") else target.__module__
    return f"{module}.{target.__qualname__}"
