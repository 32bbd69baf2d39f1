from .comparison import Comparison, compare
from .evaluation import Evaluation, score
from .predictions import as_csv, check_output, prediction_rows, write_predictions
from .tables import print_comparison, write_candidates, write_comparison

__all__ = [
    "Comparison",
    "Evaluation",
    "as_csv",
    "check_output",
    "compare",
    "prediction_rows",
    "print_comparison",
    "score",
    "write_candidates",
    "write_comparison",
    "write_predictions",
]
