from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from lightning_stitch.progress import Bar, Silent, say, timed


def screen() -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, force_terminal=True, width=100, color_system=None)


def last_lines(file: io.StringIO) -> list[str]:
    """The last state of the display, without control codes and bars."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    found: dict[str, str] = {}
    for line in re.split(r"[\r\n]+", text):
        match = re.match(r"(\S.*?)\s+[━╸╺ ]*\s(\d+/\S+)", line)
        if match:
            found[match[1]] = match[2]
    return [f"{stage} {count}" for stage, count in found.items()]


def test_a_bar_shows_each_stage_and_its_steps() -> None:
    file, console = screen()
    with Bar(console) as bar:
        bar.start("calibrating", 3)
        for _ in range(3):
            bar.advance(1)
        bar.start("ranking", 40)
        bar.advance(16)
        bar.advance(24)
    assert last_lines(file) == ["calibrating 3/3", "ranking 40/40"]


def test_a_stage_that_ends_early_or_has_no_total_is_shown_as_done() -> None:
    file, console = screen()
    with Bar(console) as bar:
        bar.start("composing", 64)
        bar.advance(5)
        bar.start("head images", None)
        bar.advance(7)
    assert last_lines(file) == ["composing 5/5", "head images 7/7"]


def test_steps_before_any_stage_are_nothing() -> None:
    file, console = screen()
    with Bar(console) as bar:
        bar.advance(3)
    assert last_lines(file) == []


def test_an_error_takes_the_bar_down_and_goes_on() -> None:
    file, console = screen()

    def broken() -> None:
        with Bar(console) as bar:
            bar.start("ranking", 4)
            raise ValueError("broken image")

    with pytest.raises(ValueError, match="broken image"):
        broken()
    # A console has room for one display: a second one would fail if the first were still up.
    with Bar(console) as bar:
        bar.start("again", 1)
        bar.advance(1)
    assert "again 1/1" in last_lines(file)


def test_silence_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as progress:
        progress.start("ranking", 4)
        progress.advance(4)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_what_is_said_goes_to_the_standard_output_or_to_the_handler_that_the_logger_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("lightning_stitch")
    say("100 % of it")
    assert capsys.readouterr().out == "100 % of it\n"
    mine, kept = logging.StreamHandler(io.StringIO()), list(logger.handlers)
    logger.handlers = [mine]
    try:
        say("elsewhere")
        assert mine.stream.getvalue() == "elsewhere\n"
        logger.setLevel(logging.WARNING)
        say("not at all")
        assert mine.stream.getvalue() == "elsewhere\n"
    finally:
        logger.handlers = kept
        logger.setLevel(logging.INFO)
    assert capsys.readouterr().out == ""


def test_a_stages_seconds_add_up_and_its_memory_is_what_the_process_held_at_most() -> None:
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for _ in range(2):
        with timed(seconds, "rank", peaks):
            once = seconds.get("rank", 0.0)
    assert seconds["rank"] > once >= 0
    assert peaks["rank"] > 2**24
