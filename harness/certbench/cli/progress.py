"""Progress for people: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between plain lines within a stage."""


class TerminalReporter:
    """A live bar with the figures beside it. Also a context manager, so that the terminal is put back in order."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=Console(stderr=True),
            transient=True,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> TerminalReporter:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, title: str, total: int, unit: str) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(f"{self.title} {title}", total=total, figures="")

    def advance(self, done: int, **figures: float) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done, figures=show(figures))

    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None:
        """The bar shows it."""

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)


class PlainReporter:
    """Lines on standard error: each stage, each epoch (thinned out where epochs are short), and what else is said."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.last = 0.0
        self.name, self.unit, self.total = "", "", 0

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def stage(self, title: str, total: int, unit: str) -> None:
        self.name, self.unit, self.total = title, unit, total
        self.last = time.monotonic()
        self.say(f"{self.title}: {title}, {total} {unit}s")

    def advance(self, done: int, **figures: float) -> None:
        if time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            self.say(f"{self.title}: {self.name} {done}/{self.total} {self.unit}s {show(figures)}")

    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None:
        if seconds >= 2 or epoch == epochs or epoch % 10 == 0:
            self.last = time.monotonic()
            self.say(f"{self.title}: epoch {epoch}/{epochs} in {seconds:.1f} s {show(figures)}")

    def say(self, line: str) -> None:
        click.echo(line, err=True)


def reporter(title: str) -> TerminalReporter | PlainReporter:
    """The reporter that suits where standard error goes."""
    return TerminalReporter(title) if sys.stderr.isatty() else PlainReporter(title)


def show(figures: Mapping[str, float]) -> str:
    return " ".join(
        f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"
        for name, value in figures.items()
    )
