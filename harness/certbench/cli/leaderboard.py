"""``certbench leaderboard``: derive boards from rows, prove that they are derived, and show them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certbench.errors import FoundError, UsageError, nearest

if TYPE_CHECKING:
    from certbench.leaderboard.board import Board

_FOLDER = click.argument(
    "folder", default="./certbench-out", type=click.Path(path_type=Path, file_okay=False), metavar="[FOLDER]"
)


@click.group()
def command() -> None:
    """Derive the leaderboards from their rows, check or show them.

    The rows are those of FOLDER/results.

    FOLDER is ./certbench-out unless named; the committed boards of this project are in `leaderboards`.

    \b
    Example:
      certbench leaderboard show leaderboards
    """


@command.command()
@_FOLDER
def build(folder: Path) -> None:
    """Write every board into FOLDER: as Markdown, LaTeX and CSV, and all of them as the page index.html.

    Cards and published figures of the installed methods are copied to methods.json there, so that the boards can be
    built again, to the byte, where these methods are not installed.

    \b
    Example:
      certbench leaderboard build certbench-out
    """
    from certbench.leaderboard.build import write

    built = write(folder)
    click.echo(f"{len(built.files)} files in {folder}: {', '.join(sorted(built.files))}")
    if built.without_page:
        click.echo(f"no index.html: {built.without_page}")


@command.command()
@_FOLDER
def check(folder: Path) -> None:
    """Exit 1 if a derived file in FOLDER differs from its rows by one byte, is missing, or has no rows.

    \b
    Example:
      certbench leaderboard check leaderboards
    """
    from certbench.leaderboard.build import check as differing

    checked = differing(folder)
    if checked.found:
        raise FoundError(
            f"{folder} is not what its rows say: {'; '.join(checked.found)}. See `certbench leaderboard build`"
        )
    click.echo(f"{folder}: every derived file is what its rows say")
    if checked.unchecked:
        click.echo(checked.unchecked)


@command.command()
@_FOLDER
@click.option("--board", "name", metavar="NAME", help="Only this board, for instance mnist-linf-0.1.")
@click.option("--json", "as_json", is_flag=True, help="Records in full precision, for a program.")
def show(folder: Path, name: str | None, as_json: bool) -> None:
    """Print the boards of FOLDER: best figures marked with a star, ranks that tie with the first with =.

    \b
    Example:
      certbench leaderboard show certbench-out --board digits-linf-0.1
    """
    from certbench.leaderboard.build import read_boards
    from certbench.leaderboard.records import records

    boards = read_boards(folder)
    if name is not None:
        names = [board.name for board in boards]
        if name not in names:
            raise UsageError(f"unknown board {name!r}; {nearest(name, names)}")
        boards = [board for board in boards if board.name == name]
    if as_json:
        click.echo(json.dumps([record for board in boards for record in records(board)], indent=2))
        return
    print_boards(boards)


def print_boards(boards: Sequence[Board]) -> None:
    """Boards as tables that fit the terminal, or as plain text where standard output is not one."""
    from certbench.leaderboard.tables import plain
    from certbench.leaderboard.terminal import show_board

    for board in boards:
        if sys.stdout.isatty():
            show_board(board)
        else:
            click.echo(plain(board))
