from .activation_store import Carried, Deferred, Portion, Spool, carry
from .fingerprints import differences, in_words, key_of, plain, tensors_hash, versions
from .hub_download import (
    WeightFile,
    client_errors,
    download_of,
    find_hub_file,
    hub_file,
    offline,
    patiently,
    sha256_of,
    status_of,
    tensor_shapes,
)
from .journal import Answer, Answers, Journal
from .tensor_files import DTYPES, UNFINISHED, complete_or_absent, raw_bytes, write_json

__all__ = [
    "Answer",
    "Answers",
    "Carried",
    "DTYPES",
    "Deferred",
    "Journal",
    "Portion",
    "Spool",
    "UNFINISHED",
    "WeightFile",
    "carry",
    "client_errors",
    "complete_or_absent",
    "differences",
    "download_of",
    "find_hub_file",
    "hub_file",
    "in_words",
    "key_of",
    "offline",
    "patiently",
    "plain",
    "raw_bytes",
    "sha256_of",
    "status_of",
    "tensor_shapes",
    "tensors_hash",
    "versions",
    "write_json",
]
