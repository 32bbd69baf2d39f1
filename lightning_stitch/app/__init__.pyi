from .demo import demo_of
from .serving import serve

__all__ = ["demo_of", "serve"]
