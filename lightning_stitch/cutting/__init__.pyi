from .copies import copied, reference_tensor, with_tensors
from .graph import Cut, CutGraph
from .probing import FORMULAS, network_activation_bytes, network_cost

__all__ = [
    "Cut",
    "CutGraph",
    "FORMULAS",
    "copied",
    "network_activation_bytes",
    "network_cost",
    "reference_tensor",
    "with_tensors",
]
