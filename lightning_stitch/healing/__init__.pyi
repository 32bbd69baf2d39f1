from .healer import Healer
from .trials import run_on

__all__ = ["Healer", "run_on"]
