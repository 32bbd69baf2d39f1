from .blocks import block_gram, centre_gram, scale_of
from .cka import CentredRows, RowBank, centre_rows, cka_of_grams, cka_with_many, linear_cka, row_bank
from .cka_metric import LinearCKA
from .decomposition import AffineMap
from .leave_one_out import block_shares, loo_ridge, loo_ridge_of_gram, ridge_weights
from .moments import RidgeMoments, ridge_of_rows
from .regression import r2, ridge_least_squares
from .rows import check_pair, portions

__all__ = [
    "AffineMap",
    "CentredRows",
    "LinearCKA",
    "RidgeMoments",
    "RowBank",
    "block_gram",
    "block_shares",
    "centre_gram",
    "centre_rows",
    "check_pair",
    "cka_of_grams",
    "cka_with_many",
    "linear_cka",
    "loo_ridge",
    "loo_ridge_of_gram",
    "portions",
    "r2",
    "ridge_least_squares",
    "ridge_of_rows",
    "ridge_weights",
    "row_bank",
    "scale_of",
]
