from .cka import CentredRows, RowBank, centre_rows, cka_of_grams, cka_with_many, linear_cka, row_bank
from .cka_metric import LinearCKA
from .left_out import Scaling, block_gram, centre_gram, check_blocks, loo_ridge, loo_ridge_of_gram
from .regression import AffineMap, r2, ridge_least_squares
from .rows import paired

__all__ = [
    "AffineMap",
    "CentredRows",
    "LinearCKA",
    "RowBank",
    "Scaling",
    "block_gram",
    "centre_gram",
    "centre_rows",
    "check_blocks",
    "cka_of_grams",
    "cka_with_many",
    "linear_cka",
    "loo_ridge",
    "loo_ridge_of_gram",
    "paired",
    "r2",
    "ridge_least_squares",
    "row_bank",
]
