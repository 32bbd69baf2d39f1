"""Predictions as rows of a table, written as CSV or JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.io import complete_or_absent
from lightning_stitch.tables import Record, csv_text

SUFFIXES = (".csv", ".jsonl")


def prediction_rows(
    files: Sequence[str], outputs: Tensor, names: Sequence[str] | None = None, *, task: str = "multiclass"
) -> list[Record]:
    """One row for each image, of plain strings, numbers, lists and dicts.

    | task | fields |
    |---|---|
    | "multiclass" | file, class (the most probable), probability (its own), probabilities (class -> number) |
    | "multilabel" | file, labels (those of a probability of at least 0.5), probabilities (label -> number) |
    | "regression" | file, values (target -> number) |

    Args:
        files: Name of each image.
        outputs: Images x columns, what the module's `predict_step` gives: probabilities, or values.
        names: What each column is called; None: its number, from 0.
        task: One of the above.

    Raises:
        StitchError: If the sizes do not agree, or there is no such task.

    Example:
        >>> prediction_rows(["a.png"], torch.tensor([[0.25, 0.75]]), ["cat", "dog"])
        [{'file': 'a.png', 'class': 'dog', 'probability': 0.75, 'probabilities': {'cat': 0.25, 'dog': 0.75}}]
    """
    if task not in ("multiclass", "multilabel", "regression"):
        raise StitchError(f"There is no way to write predictions of the task {task!r}.")
    outputs = outputs.unsqueeze(1) if outputs.ndim == 1 else outputs
    if outputs.ndim != 2 or len(outputs) != len(files):
        raise StitchError(
            f"predict_step should give one row of numbers for each image; found {tuple(outputs.shape)} for "
            f"{len(files)} images."
        )
    columns = [str(index) for index in range(outputs.shape[1])] if names is None else list(names)
    if len(columns) != outputs.shape[1]:
        raise StitchError(f"There are {len(columns)} names {columns[:10]} for {outputs.shape[1]} predicted columns.")
    rows: list[Record] = []
    # str() of a float32 has the fewest digits that tell it from its neighbours.
    for file, numbers in zip(files, outputs.detach().float().cpu().numpy(), strict=True):
        by_name = {name: float(str(number)) for name, number in zip(columns, numbers, strict=True)}
        row: Record = {"file": file}
        if task == "multiclass":
            best = columns[int(numbers.argmax())]
            row |= {"class": best, "probability": by_name[best], "probabilities": by_name}
        elif task == "multilabel":
            labels = [name for name, number in by_name.items() if number >= 0.5]
            row |= {"labels": labels, "probabilities": by_name}
        else:
            row |= {"values": by_name}
        rows.append(row)
    return rows


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Raises:
        StitchError: If its suffix is unknown, its folder cannot be written to, or it exists and is not to be replaced.
    """
    path = Path(output)
    if path.suffix.lower() not in SUFFIXES:
        raise StitchError(f"Predictions are written as {' or '.join(SUFFIXES)}; found the output file {path}.")
    if not os.access(path.parent, os.W_OK):
        raise StitchError(f"The folder {path.parent} for {path.name} does not exist or cannot be written to.")
    if path.is_dir():
        raise StitchError(f"{path} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise StitchError(f"{path} exists; name another file, or have it replaced (overwrite, --overwrite).")


def write_predictions(rows: Sequence[Record], output: str | Path) -> None:
    """Write a file of `prediction_rows`, whole or not at all, in the form that its suffix (.csv, .jsonl) says.

    A file that is there is replaced. In CSV a mapping becomes one column for each of its names, "probability_NAME" or
    "value_NAME", and a list is joined by semicolons. JSON lines hold the rows as they are. Names of files that are not
    UTF-8 keep their bytes in CSV.
    """
    path = Path(output)
    text = as_csv(rows) if path.suffix.lower() == ".csv" else "".join(json.dumps(row) + "\n" for row in rows)
    with complete_or_absent(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))


def as_csv(rows: Sequence[Record]) -> str:
    """The rows as CSV, with a header."""
    stems = {"probabilities": "probability", "values": "value"}
    flat = []
    for row in rows:
        cells: Record = {}
        for key, value in row.items():
            if isinstance(value, dict):
                cells |= {f"{stems.get(key, key)}_{name}": number for name, number in value.items()}
            else:
                cells[key] = ";".join(value) if isinstance(value, list) else value
        flat.append(cells)
    return csv_text(flat)
