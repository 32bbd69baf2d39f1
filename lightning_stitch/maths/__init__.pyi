from .cka import CentredRows, RowBank, centre_rows, cka_with_many, linear_cka, row_bank
from .cka_metric import LinearCKA
from .regression import AffineMap, loo_ridge, r2, ridge_least_squares, ridge_weights
from .rows import paired

__all__ = [
    "AffineMap",
    "CentredRows",
    "LinearCKA",
    "RowBank",
    "centre_rows",
    "cka_with_many",
    "linear_cka",
    "loo_ridge",
    "paired",
    "r2",
    "ridge_least_squares",
    "ridge_weights",
    "row_bank",
]
