"""Boards as Markdown, as LaTeX and as text for a terminal or a pipe.

Nothing here depends on the clock, the machine or the locale: equal boards give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from certbench.leaderboard import columns as c
from certbench.leaderboard import escape
from certbench.leaderboard.board import Board
from certbench.leaderboard.columns import Column, cells, columns, lines
from certbench.leaderboard.comparison import STATES, Cell
from certbench.leaderboard.foot import DERIVED, SWEPT, VOIDED, foot, voided
from certbench.leaderboard.published import PublishedFigure
from certbench.leaderboard.row import Row

MARKER = "<!-- certbench: derived from rows; do not edit -->"
"""The first line of every derived Markdown file."""
LATEX_MARKER = "% certbench: derived from rows; do not edit"
"""The first line of every derived LaTeX file."""


# Markdown ----------------------------------------------------------------------------------------------------------


def markdown(board: Board) -> str:
    """The board as a Markdown page: title, table, and a foot that says how to read it."""
    shown = columns(board)
    parts = [
        MARKER,
        f"# {escape.markdown(board.title)}",
        _board_table(board.rows, shown) if board.rows else "No row stands.",
    ]
    if board.swept:
        parts += ["## Settings", SWEPT, _board_table(board.swept, unranked(shown))]
    if board.voided:
        why = "\n".join(f"* {escape.markdown(voided(row))}" for row in board.voided)
        parts += ["## Voided", VOIDED, _board_table(board.voided, shown), why]
    if board.swept or board.voided:
        parts.append("## Notes")
    notes = "\n".join(f"* {_marked_up(line)}" for line in foot(board))
    return "\n\n".join([*parts, notes]) + "\n"


def settings(count: int) -> str:
    return f"{count} {'setting' if count == 1 else 'settings'}"


def unranked(shown: Sequence[Column]) -> list[Column]:
    return [column for column in shown if column.header != "rank"]


def _marked_up(line: str) -> str:
    """Our own lines keep their code spans; everything else is escaped."""
    return line if line == DERIVED or line.startswith("not audited:") else escape.markdown(line)


def _board_table(rows: Iterable[Row], shown: Sequence[Column]) -> str:
    table = [[escape.markdown(cell) for cell in cells(line, shown)] for line in lines(rows)]
    return _pipe([column.header for column in shown], table, _align(shown))


def _align(shown: Sequence[Column]) -> list[str]:
    return ["left" if column.kind == "text" else "right" for column in shown]


def _pipe(headers: Sequence[str], table: Sequence[Sequence[str]], align: Sequence[str]) -> str:
    return tabulate(table, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def index(found: Sequence[Board], others: Sequence[str] = ()) -> str:
    """A Markdown page that leads to every board, and to the other pages named."""
    headers = ("board", "data set", "norm", "size", "protocol", "rows", "best")
    table = []
    for board in found:
        words = (board.dataset, board.norm, board.radius, board.protocol, str(len(board.rows)), leader(board))
        table.append([f"[{board.name}]({board.name}.md)", *map(escape.markdown, words)])
    links = "".join(f"[{name}]({name}.md)\n\n" for name in others)
    body = _pipe(headers, table, ["left"] * 5 + ["right"] * 2)
    return f"{MARKER}\n\n# Leaderboards\n\n{body}\n\n{links}{DERIVED}\n"


def leader(board: Board) -> str:
    """The row or rows with the best figure that the board is ordered by."""
    name, digits = ("acr", 4) if board.smoothed else ("certified", 2)
    best = [board.rows[place] for place in sorted(board.best(name))]
    what = "ACR" if board.smoothed else "certified %"
    return ", ".join(f"{row.method} {c.figure(getattr(row, name), digits)} {what}" for row in best)


def reproduction(found: Sequence[Cell]) -> str:
    """A Markdown page that says of every published figure what became of it."""
    table = [[escape.markdown(text) for text in reproduction_line(cell)] for cell in found]
    align = ["left"] * 5 + ["right"] * 4 + ["left"]
    counts = ", ".join(f"{count} {state}" for state, count in states(found).items())
    return f"{MARKER}\n\n# Reproduction\n\n{counts}.\n\n{_pipe(REPRODUCTION, table, align)}\n\n{_READING}\n\n{DERIVED}\n"


REPRODUCTION = (
    "state",
    "method",
    "setting",
    "model",
    "figure",
    "published",
    "measured",
    "difference",
    "in sd",
    "source",
)
_READING = (
    "reproduced: within two standard deviations of the published figure; off: farther away, in either direction. The "
    "standard deviation is the published one; where none is published, that of our seeds, or else that of drawing so "
    "many test images. Errors are shown as accuracies. Only rows of this harness count, made by the certifier, guarantee and "
    "draws that their recipe asks for, and none of a figure of other settings; others stand beside, with the reason."
)


def states(found: Sequence[Cell]) -> dict[str, int]:
    """How many cells are in each state; ``beside`` only where there are any."""
    counts = {state: sum(cell.state == state for cell in found) for state in STATES}
    return {state: count for state, count in counts.items() if count or state != "beside"}


def reproduction_line(cell: Cell) -> list[str]:
    """One line of the reproduction table under :data:`REPRODUCTION`, as plain text."""
    published, found = cell.figure, cell.compared
    digits = 4 if published.metric == "acr" else 2
    of = "" if found is None or found.scale == "published" else f" (of {found.scale})"
    return [
        cell.state,
        published.method,
        f"{published.dataset}, {published.norm}, {published.size}",
        f"{published.model}, {published.epochs} epochs" if published.epochs else published.model,
        metric_name(published),
        c.figure(cell.value, digits),
        c.figure(found.measured, digits) if found else "",
        f"{found.difference:+.{digits}f}" if found else "",
        f"{found.deviations:+.1f}{of}" if found else "",
        cell.label,
    ]


def metric_name(figure: PublishedFigure) -> str:
    """The figure's name on boards: errors are shown as accuracies."""
    if figure.metric == "acr":
        return "ACR"
    word = "clean" if figure.metric.startswith("clean") else "certified"
    return f"{word} % at {figure.at}" if figure.at is not None else f"{word} %"


# LaTeX -------------------------------------------------------------------------------------------------------------


def latex(board: Board) -> str:
    """The board as a LaTeX fragment for ``\\input``; it needs the packages booktabs and graphicx."""
    shown = columns(board)
    parts = [LATEX_MARKER, "% needs \\usepackage{booktabs,graphicx}", f"% {escape.latex(board.title)}"]
    if board.rows:
        parts.append(_tabular(board.rows, shown))
    if board.swept:
        parts += [r"\par\smallskip\noindent Settings:", _tabular(board.swept, unranked(shown))]
    if board.voided:
        parts += [r"\par\smallskip\noindent Voided:", _tabular(board.voided, shown)]
    notes = [escape.latex(line) for line in (*map(voided, board.voided), *foot(board))]
    return (
        "\n".join([*parts, r"\par\smallskip{\footnotesize\noindent", *(f"{n}\\\\" for n in notes), "}"])
        + "\n"
    )


def _tabular(rows: Iterable[Row], shown: Sequence[Column]) -> str:
    table = [[escape.latex(cell) for cell in cells(line, shown)] for line in lines(rows)]
    headers = [escape.latex(column.header) for column in shown]
    body = tabulate(
        table, headers=headers, tablefmt="latex_raw", colalign=_align(shown), disable_numparse=True
    )
    ruled = body.split(r"\hline")
    body = r"\toprule".join(ruled[:2]) + r"\midrule" + r"\bottomrule".join(ruled[2:])
    return f"\\noindent\\resizebox{{\\linewidth}}{{!}}{{%\n{body}}}"


# Terminal ----------------------------------------------------------------------------------------------------------


def marked(board: Board) -> list[list[str]]:
    """Lines for a terminal: control characters removed, the best figures of a column marked with a star, and ranks
    that are tied with the first with an equals sign."""
    shown = columns(board)
    tied = board.tied()
    found = []
    place = -1
    for line in lines(board.rows):
        text = [escape.printable(cell) for cell in cells(line, shown)]
        if isinstance(line, Row):
            place += 1
            for at, column in enumerate(shown):
                if column.best and place in board.best(column.best):
                    text[at] += " *"
                if column.header == "rank" and place in tied and len(tied) > 1:
                    text[at] += " ="
        found.append(text)
    return found


def plain(board: Board) -> str:
    """The board as text for a terminal or a pipe."""
    shown = columns(board)
    table = "No row stands."
    if board.rows:
        headers = [column.header for column in shown]
        align = _align(shown)
        table = tabulate(
            marked(board), headers=headers, tablefmt="simple", colalign=align, disable_numparse=True
        )
    below = "".join(f"\n{line}" for line in beneath(board))
    return f"{title(board)}\n\n{table}\n{below}"


def title(board: Board) -> str:
    """The line above a board in a terminal."""
    tied = ", = tied with the first" if len(board.tied()) > 1 else ""
    return f"{escape.printable(board.name)} (protocol {escape.printable(board.protocol)}; * best{tied})"


def beneath(board: Board) -> list[str]:
    """What stands below a board in a terminal: how it was attacked, and a line for every voided row."""
    found = [line for line in foot(board) if line.startswith("Attacked with")]
    if board.swept:
        found.append(f"Not shown: {settings(len(board.swept))} of these recipes; see {board.name}.md.")
    found += [f"Voided: {voided(row)}" for row in board.voided]
    return [escape.printable(line) for line in found]
