from .copies import copied, reference_tensor, with_tensors
from .graph import Cut, CutGraph
from .probing import FORMULAS, network_activation_bytes, network_cost
from .tracing import left_as_it_was

__all__ = [
    "Cut",
    "CutGraph",
    "FORMULAS",
    "copied",
    "left_as_it_was",
    "network_activation_bytes",
    "network_cost",
    "reference_tensor",
    "with_tensors",
]
