from .activation_memory import Occupancy
from .copies import copied, reference_tensor, with_tensors
from .graph import Cut, CutGraph
from .probing import FORMULAS, network_cost

__all__ = ["Cut", "CutGraph", "FORMULAS", "Occupancy", "copied", "network_cost", "reference_tensor", "with_tensors"]
