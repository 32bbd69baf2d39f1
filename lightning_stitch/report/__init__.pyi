from .comparison import Comparison, compare
from .evaluation import Evaluation, score
from .predictions import as_csv, check_output, prediction_rows, write_predictions
from .tables import print_comparison, write_candidates, write_comparison
from .verdicts import Verdict, judge_splits

__all__ = [
    "Comparison",
    "Evaluation",
    "Verdict",
    "as_csv",
    "check_output",
    "compare",
    "judge_splits",
    "prediction_rows",
    "print_comparison",
    "score",
    "write_candidates",
    "write_comparison",
    "write_predictions",
]
