from .healer import Healer

__all__ = ["Healer"]
