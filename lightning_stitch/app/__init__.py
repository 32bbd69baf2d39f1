"""An app in the browser, in Gradio (`pip install 'lightning-stitch[app]'`).

In reading order:

- `demo.py`: `demo_of`: of a prepared pool a page that composes a network for a few labelled images, of a classifier one
  that predicts
- `serving.py`: `serve`: show it, here or in a Space

Images that are uploaded and classifiers to download stay in Gradio's temporary folder on the machine that serves the
page; it looks every hour for those older than an hour and deletes them. A page fetches nothing from elsewhere.

Example:
    >>> from lightning_stitch import Pool, load_sources
    >>> from lightning_stitch.app import demo_of, serve
    >>> pool = Pool.prepare(load_sources(["resnet18.a1_in1k", "efficientnet_b0.ra_in1k"]))  # doctest: +SKIP
    >>> serve(demo_of(pool))  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
