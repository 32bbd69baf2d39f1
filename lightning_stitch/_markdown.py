"""Text of unknown origin in Markdown: it stays text, whatever it holds; a card has words of strangers' recipes."""

from __future__ import annotations

import re


def fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of backticks in it, so the text cannot end it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def span(text: object) -> str:
    """A span of code, in a line or in a table's cell; a pipe in it would end the cell, a backtick the span."""
    return f"`{_one_line(text).replace('|', '/').replace('`', chr(39)) or ' '}`"


def inline(text: object) -> str:
    """Words in a line, or a paragraph of their own: neither markup nor HTML, and no heading or list."""
    escaped = re.sub(r"[\\`*\[\]<>|~]", r"\\\g<0>", _one_line(text))
    # What only the start of a line makes a heading, a list or a rule.
    return re.sub(r"^(\d*)([#+=_.)-])", r"\1\\\2", escaped)


def cell(text: object) -> str:
    """Words in a table's cell, which end neither it nor the row."""
    return inline(_one_line(text).replace("|", "/"))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
