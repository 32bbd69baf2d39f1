from .comparison import Comparison, compare
from .evaluation import Evaluation, score
from .page import figure_files, write_page
from .predictions import as_csv, check_output, prediction_rows, write_predictions
from .record import FILE, images_to_show, read_record, record_of, thumbnail
from .similarities import similarities_of
from .tables import print_comparison, write_candidates, write_comparison
from .verdicts import MARGIN, Verdict, check_margin, in_words, judge, judge_splits

__all__ = [
    "Comparison",
    "FILE",
    "Evaluation",
    "MARGIN",
    "Verdict",
    "as_csv",
    "check_margin",
    "check_output",
    "compare",
    "figure_files",
    "images_to_show",
    "in_words",
    "judge",
    "judge_splits",
    "prediction_rows",
    "print_comparison",
    "read_record",
    "record_of",
    "score",
    "similarities_of",
    "thumbnail",
    "write_candidates",
    "write_comparison",
    "write_page",
    "write_predictions",
]
