"""A progress that remembers."""

from __future__ import annotations


class Recorder:
    """A progress that remembers each stage's name, total and steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None, int]] = []

    def start(self, stage: str, total: int | None) -> None:
        self.stages.append((stage, total, 0))

    def advance(self, steps: int) -> None:
        stage, total, done = self.stages[-1]
        self.stages[-1] = (stage, total, done + steps)
