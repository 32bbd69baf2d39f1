from .activation_memory import Occupancy
from .copies import copied, reference_tensor, with_tensors
from .graph import Cut, CutGraph
from .probing import FORMULAS, network_cost
from .tracing import left_as_it_was

__all__ = [
    "Cut",
    "CutGraph",
    "FORMULAS",
    "Occupancy",
    "copied",
    "left_as_it_was",
    "network_cost",
    "reference_tensor",
    "with_tensors",
]
