from .comparison import Comparison, compare
from .evaluation import Evaluation, score
from .predictions import as_csv, check_output, prediction_rows, write_predictions
from .tables import print_table, write_candidates, write_table

__all__ = [
    "Comparison",
    "Evaluation",
    "as_csv",
    "check_output",
    "compare",
    "prediction_rows",
    "print_table",
    "score",
    "write_candidates",
    "write_predictions",
    "write_table",
]
