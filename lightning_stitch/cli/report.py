"""`lightning-stitch report RUN`: the page of a search, made again."""

from __future__ import annotations


def report(run: str, output: str | None = None) -> None:
    """Make the HTML page of a search again, from the report.json that it left.

    Args:
        run: The log directory of a fit, or the output of compose.
        output: A folder for the page and its figures; null is the run's own.

    Raises:
        StitchError: If there is no such record, or the page cannot be written.
    """
    from pathlib import Path

    from lightning_stitch.report import read_record, write_page

    print(f"Wrote {write_page(read_record(Path(run)), output or run)}.")
