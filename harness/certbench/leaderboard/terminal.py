"""A board as a table in a terminal, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from certbench.leaderboard.board import Board
from certbench.leaderboard.tables import HEADERS, marked, printable, voided

_NAMES = 5
_BORDER = 3  # padding and line of one column
_FIRST_TO_GO = (
    "device",
    "train s",
    "certify s",
    "recipe",
    "falsified",
    "ACR/cap",
    "failed",
    "unknown",
    "Δ clean",
    "seeds",
    "guarantee",
    "model",
    "ACR",
    "certifier",
    "Δ certified",
    "audit",
    "attacked %",
)


def show_board(board: Board, console: Console | None = None) -> None:
    """Print the board, rows with a best figure in bold. Columns that are empty, or that the width has no room for,
    are left out; the latter are named below the table."""
    console = console or Console()
    lines = marked(board)
    filled = [place for place in range(len(HEADERS)) if any(line[place] for line in lines)]
    used = _fitting(filled, lines, console.width)
    table = Table(
        title=Text(f"{printable(board.name)} (protocol {printable(board.protocol)}; * best)"),
        title_justify="left",
        caption=_left_out([HEADERS[place] for place in filled if place not in used]),
        caption_justify="left",
    )
    for place in used:
        table.add_column(HEADERS[place], justify="left" if place < _NAMES else "right", overflow="fold")
    for line in lines:
        measured = bool(line[2])  # published figures name no network
        style = "dim" if not measured else "bold" if any(cell.endswith(" *") for cell in line[7:9]) else ""
        table.add_row(
            *(Text(line[place]) for place in used), style=style
        )  # Text: no markup is read from names
    console.print(table)
    for words in voided(board):
        console.print(Text(words), style="bold red")


def _fitting(filled: Sequence[int], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns to show: the least telling go first, until the rest fits."""
    used = list(filled)
    needed = {p: _BORDER + max([len(HEADERS[p]), *(len(line[p]) for line in lines)]) for p in used}
    for header in _FIRST_TO_GO:
        if sum(needed[place] for place in used) < width:
            break
        used = [place for place in used if HEADERS[place] != header]
    return used


def _left_out(headers: Sequence[str]) -> Text | None:
    return Text(f"No room for: {', '.join(headers)}. See --json.") if headers else None
