"""``certbench data``: where the data sets are, fetching them, checking every byte."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from certbench.contract import SilentReporter
from certbench.errors import FoundError

if TYPE_CHECKING:
    from rich.progress import Progress

_data_option = click.option(
    "--data",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    help="The data folder. Default: the one CERTBENCH_DATA names, else ./data.",
)


@click.group("data")
def command() -> None:
    """Look for data sets, fetch them, and check them.

    \b
    Example:
      certbench data status
      certbench data fetch mnist --data ~/data
    """


@command.command("status")
@_data_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def status_command(root: Path | None, as_json: bool) -> None:
    """Which data sets are there, judged by file names and sizes.

    \b
    Example:
      certbench data status --data ~/data
    """
    from tabulate import tabulate

    from certbench.data.fetch import status
    from certbench.plugins import installed

    rows = [asdict(row) for row in status(root, installed().datasets())]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    headers = {"name": "data set", "state": "state", "where": "where", "next_step": "next step"}
    click.echo(tabulate(rows, headers=headers, tablefmt="plain"))


@command.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_data_option
def fetch_command(names: tuple[str, ...], root: Path | None) -> None:
    """Download data sets, verify them, and put them into the data folder.

    What is there and whole is kept; a damaged file is replaced.

    \b
    Example:
      certbench data fetch mnist cifar10 --data ~/data
    """
    from certbench.data.fetch import fetch
    from certbench.plugins import installed

    wanted = [
        installed().dataset(name) for name in names
    ]  # a misspelt last name is told before the first download
    for info in wanted:
        with DownloadProgress() as progress:
            fetch(info, root, progress)


@command.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@_data_option
def verify_command(names: tuple[str, ...], root: Path | None) -> None:
    """Check every byte of data sets; exit code 1 if something is wrong.

    Without names, all data sets of which files are found are checked, and the others are passed over.

    \b
    Example:
      certbench data verify mnist
    """
    from certbench.data.fetch import status, verify
    from certbench.plugins import installed

    rows = [] if names else status(root, installed().datasets())
    absent = [row.name for row in rows if row.state == "missing"]
    wanted = names or tuple(row.name for row in rows if row.state != "missing")
    wrong = []
    for name in wanted:
        problems = verify(installed().dataset(name), root)
        click.echo(f"{name}: {'; '.join(problems) or 'every byte as published'}")
        wrong.extend([name] if problems else [])
    for name in absent:
        click.echo(f"{name}: not there, not checked")
    if wrong:
        raise FoundError(
            f"{len(wrong)} of {len(wanted)} data sets cannot be used as they are: {', '.join(wrong)}"
        )


class DownloadProgress(SilentReporter):
    """A reporter of bytes or images: silent for two seconds, then a bar on a terminal or a line every tenth of the way."""

    PATIENCE = 2.0

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._title, self._total, self._unit, self._started, self._next_line = "", 0, "byte", 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_bar()

    def stage(self, title: str, total: int, unit: str) -> None:
        self._close_bar()
        self._title, self._total, self._unit = title, total, unit
        self._started, self._next_line = time.monotonic(), 0.0

    def advance(self, done: int, **figures: float) -> None:
        if time.monotonic() - self._started < self.PATIENCE:
            return
        if sys.stderr.isatty():
            self._bar = self._bar or _open_bar(self._title, self._total, self._unit)
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif done >= self._next_line:
            in_bytes = self._unit == "byte"
            self._next_line = done + max(self._total / 10, 1 << 20 if in_bytes else 1)
            share = f" ({done / self._total:.0%})" if self._total else ""
            amount = f"{done / 1e6:.1f} MB" if in_bytes else f"{done:,} {self._unit}s"
            click.echo(f"{self._title}: {amount}{share}", err=True)

    def say(self, line: str) -> None:
        self._close_bar()
        click.echo(line)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def _open_bar(title: str, total: int, unit: str) -> Progress:
    from rich import progress
    from rich.console import Console
    from rich.progress import Progress

    amount = progress.DownloadColumn() if unit == "byte" else progress.MofNCompleteColumn()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        amount,
        progress.TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=total or None)
    bar.start()
    return bar
