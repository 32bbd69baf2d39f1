"""What is shown: comparisons, tables, predictions.

In reading order:

- `evaluation.py`: a network on test images: scores with intervals, and costs
- `paired_tests.py`: tests of two networks on the same images
- `verdicts.py`: better, equivalent, worse or undecided, and whether it is worth it
- `kinds.py`: what kinds of networks there are, and what they are called
- `finalists.py`: which networks are compared
- `similarities.py`: how alike the sources are, cut by cut
- `comparison.py`: chosen networks beside all sources, same head and labels, on test images that chose nothing
- `tables.py`: tables of a comparison and of a search's candidates: on the console, as CSV and as JSON
- `record.py`, `figures.py`, `page.py`: a search as values, as figures, and as one HTML page
- `predictions.py`: predictions as rows of a table, CSV or JSON lines

A row of predictions has the file, the class, its probability and every class's; rows stand in the order of the
files::

    file,class,probability,probability_defective,probability_functional
    new_images/cell_0001.png,defective,0.7285532,0.7285532,0.27144685

Predictions are written whole or not at all.

Example:
    >>> import torch
    >>> from lightning_stitch.report import prediction_rows
    >>> rows = prediction_rows(["a.png"], torch.tensor([[0.25, 0.75]]), ["bad", "good"])
    >>> rows[0]["class"]
    'good'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
