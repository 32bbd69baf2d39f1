from .cka import CentredRows, RowBank, centre_rows, cka_of_grams, cka_with_many, linear_cka, row_bank
from .cka_metric import LinearCKA
from .regression import AffineMap, loo_ridge, r2, ridge_least_squares, ridge_weights
from .rows import paired
from .tmp_gram import block_gram, loo_ridge_of_gram

__all__ = [
    "AffineMap",
    "CentredRows",
    "LinearCKA",
    "RowBank",
    "block_gram",
    "centre_rows",
    "cka_of_grams",
    "cka_with_many",
    "linear_cka",
    "loo_ridge",
    "loo_ridge_of_gram",
    "paired",
    "r2",
    "ridge_least_squares",
    "ridge_weights",
    "row_bank",
]
