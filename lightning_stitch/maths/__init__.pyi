from .blocks import block_gram
from .cka import CentredRows, RowBank, centre_rows, cka_with_many, linear_cka, row_bank
from .cka_metric import LinearCKA
from .decomposition import AffineMap
from .leave_one_out import loo_ridge, loo_ridge_of_gram, ridge_weights
from .regression import r2, ridge_least_squares
from .rows import paired

__all__ = [
    "AffineMap",
    "CentredRows",
    "LinearCKA",
    "RowBank",
    "block_gram",
    "centre_rows",
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
