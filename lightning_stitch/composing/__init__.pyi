from .ensembling import ensemble
from .personal import Composition, compose_personal
from .pool import Pool
from .shrinking import shrink

__all__ = ["Composition", "Pool", "compose_personal", "ensemble", "shrink"]
