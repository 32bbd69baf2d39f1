from .ensembling import ensemble
from .personal import Composition, compose
from .pool import Pool
from .shrinking import shrink

__all__ = ["Composition", "Pool", "compose", "ensemble", "shrink"]
