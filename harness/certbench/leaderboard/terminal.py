"""A board as a table in a terminal, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from certbench.leaderboard.board import Board
from certbench.leaderboard.columns import columns
from certbench.leaderboard.tables import beneath, marked, title

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
    "abstained %",
    "alpha",
    "alpha of all",
    "mean draws",
    "proved by %",
    "seeds",
    "guarantee",
    "model",
    "n",
    "images",
    "certifier",
    "Δ certified",
    "Δ ACR",
    "rank",
    "submitted by",
    "attacked %",
    "ACR",
)


def show_board(board: Board, console: Console | None = None) -> None:
    """Print the board, rows with a best figure in bold. Columns that are empty, or that the width has no room for,
    are left out; the latter are named below the table."""
    console = console or Console()
    shown, lines = columns(board), marked(board)
    headers = [column.header for column in shown]
    filled = [place for place in range(len(shown)) if any(line[place] for line in lines)]
    used = _fitting(filled, headers, lines, console.width)
    table = Table(
        title=Text(title(board)),
        title_justify="left",
        caption=_left_out([headers[place] for place in filled if place not in used]),
        caption_justify="left",
    )
    for place in used:
        justify = "left" if shown[place].kind == "text" else "right"
        table.add_column(headers[place], justify=justify, overflow="fold")  # type: ignore[arg-type]  # a literal
    for line in lines:
        measured = bool(line[headers.index("model")])  # published figures name no network
        style = "dim" if not measured else "bold" if any(cell.endswith(" *") for cell in line) else ""
        table.add_row(
            *(Text(line[place]) for place in used), style=style
        )  # Text: no markup is read from names
    console.print(table)
    for words in beneath(board):
        console.print(Text(words), style="bold red" if words.startswith("Voided") else "dim")


def _fitting(
    filled: Sequence[int], headers: Sequence[str], lines: Sequence[Sequence[str]], width: int
) -> list[int]:
    """The columns to show: the least telling go first, until the rest fits."""
    used = list(filled)
    needed = {p: _BORDER + max([len(headers[p]), *(len(line[p]) for line in lines)]) for p in used}
    for header in _FIRST_TO_GO:
        if sum(needed[place] for place in used) < width:
            break
        used = [place for place in used if headers[place] != header]
    return used


def _left_out(headers: Sequence[str]) -> Text | None:
    return Text(f"No room for: {', '.join(headers)}. See --json.") if headers else None
