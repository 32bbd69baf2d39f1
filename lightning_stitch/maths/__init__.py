"""Similarity and regression of rows: pure tensor maths.

Rows are samples (images, pixels, tokens), columns are channels. Inputs are of any real dtype, sums run in float64. In
reading order:

- `rows.py`: rows of activations, checked, paired and centred
- `cka.py`: linear CKA, debiased and biased, of whole, streamed and stored rows; its equations are in the docstring
- `cka_metric.py`: the same as a torchmetrics `Metric`, streamed over batches and merged over processes
- `blocks.py`: readouts as blocks of features that count alike, and their Gram matrices
- `decomposition.py`: what ridge regression needs of rows, from the smaller of their two Gram matrices
- `regression.py`: ridge least squares, R2
- `leave_one_out.py`: ridge for many strengths at once, from features or Gram matrices, judged on rows left out
- `moments.py`: ridge at one known strength, while rows join and leave

Example:
    >>> import torch
    >>> from lightning_stitch.maths import linear_cka, r2, ridge_least_squares
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> y = x @ torch.ones(8, 3) + 1
    >>> round(float(linear_cka(x, x)), 6)
    1.0
    >>> fitted = ridge_least_squares(x, y, ridge=0.0)
    >>> round(float(r2(x @ fitted.weight.to(x).T + fitted.bias.to(x), y)), 6)
    1.0
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
