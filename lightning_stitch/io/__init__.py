"""Downloads, tensor files, activations that wait on disk, the journal of a search."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
