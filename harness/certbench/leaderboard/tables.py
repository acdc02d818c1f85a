"""Boards as Markdown, as CSV, as records for programs and as text for a terminal.

Names, sources and settings come from recipes and plugins that anybody may write, so every string is made inert for the
place it is shown in. Nothing here depends on the clock, the machine or the locale: equal boards give equal bytes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from certbench.leaderboard.board import Board, Figure, Published, Row
from certbench.threat import format_radius

MARKER = "<!-- certbench: derived from rows; do not edit -->"
"""The first line of every derived Markdown file."""
CSV_MARKER = "certbench_board,"
"""How every derived CSV file begins."""

GUARANTEES = {
    "real_arith": "proved in real arithmetic, computed in floating point; round-off of the computation is not covered",
    "float_sound": "proved with outward rounding; the round-off of floating point is covered",
    "statistical": "holds with probability 1 - alpha over the certifier's sampling, for each image on its own",
}
_NOTHING = ""
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
HEADERS = (
    "method",
    "recipe",
    "model",
    "certifier",
    "guarantee",
    "seeds",
    "images",
    "clean %",
    "certified %",
    "ACR",
    "ACR/cap",
    "unknown",
    "falsified",
    "failed",
    "train s",
    "certify s",
    "device",
    "Δ clean",
    "Δ certified",
)
_LEFT = 5  # the columns of names; numbers are set to the right


# Cells -------------------------------------------------------------------------------------------------------------


def cells(board: Board) -> list[tuple[Row | Published, list[str]]]:
    """The board's lines as plain text under :data:`HEADERS`, each measured row followed by its published figures."""
    lines: list[tuple[Row | Published, list[str]]] = []
    for row in board.rows:
        lines.append((row, _measured(row)))
        lines += [(published, _reference(published)) for published in row.published]
    return lines


def _measured(row: Row) -> list[str]:
    verdicts = row.verdicts
    return [
        row.method,
        f"{row.recipe} ({row.variant})" if row.variant else row.recipe,
        row.model,
        row.certifier,
        row.guarantee if row.deploy == "float32" else f"{row.guarantee} ({row.deploy})",
        str(len(row.seeds)),
        str(row.images) if row.complete else f"{row.images} of {row.expected}",
        _percent(row.clean),
        _percent(row.certified),
        _figure(row.acr, 4) or "incomplete",
        _number(row.acr_of_cap, 3),
        str(verdicts["unknown"] + verdicts["abstain"]),
        str(verdicts["falsified"]),
        str(verdicts["timeout"] + verdicts["error"]),
        _number(row.train_seconds, 1),
        _number(row.certify_seconds, 1),
        "; ".join(row.devices),
        _NOTHING,
        _NOTHING,
    ]


def _reference(published: Published) -> list[str]:
    line = [_NOTHING] * len(HEADERS)
    line[0], line[1] = "published", published.source
    line[7], line[8] = _percent(published.clean), _percent(published.certified)
    line[-2] = _signed(published.clean_difference)
    line[-1] = _signed(published.certified_difference)
    return line


def _percent(figure: Figure | None) -> str:
    return _figure(figure, 2)


def _figure(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return _NOTHING
    spread = f" ± {figure.deviation:.{digits}f}" if figure.deviation is not None else ""
    return f"{figure.mean:.{digits}f}{spread}"


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:+.2f}"


# Markdown ----------------------------------------------------------------------------------------------------------


def markdown(board: Board) -> str:
    """The board as a Markdown page: title, table, and a foot that says how to read it."""
    lines = [[escape_markdown(cell) for cell in line] for _, line in cells(board)]
    align = ["left"] * _LEFT + ["right"] * (len(HEADERS) - _LEFT)
    foot = "\n".join(f"* {line}" for line in _foot(board))
    title = escape_markdown(board.title)
    return f"{MARKER}\n\n# {title}\n\n{_pipe(HEADERS, lines, align)}\n\n{foot}\n"


def index(found: Sequence[Board]) -> str:
    """A Markdown page that leads to every board."""
    headers = ("board", "data set", "norm", "size", "protocol", "rows", "best certified %")
    lines = []
    for board in found:
        best = [board.rows[place] for place in sorted(board.best("certified"))]
        shown = ", ".join(f"{row.method} {_percent(row.certified)}" for row in best)
        words = (board.dataset, board.norm, board.radius, board.protocol, str(len(board.rows)), shown)
        lines.append([f"[{board.name}]({board.name}.md)", *map(escape_markdown, words)])
    align = ["left"] * 5 + ["right"] * 2
    return f"{MARKER}\n\n# Leaderboards\n\n{_pipe(headers, lines, align)}\n\n{_DERIVED}\n"


_DERIVED = "Derived by `certbench leaderboard build` from the rows in `results/`; do not edit."


def _foot(board: Board) -> Iterable[str]:
    rows = board.rows
    yield f"Protocol: {escape_markdown(board.protocol)}."
    caps = sorted({row.cap for row in rows if row.cap is not None})
    if caps:
        yield f"Cap of the radius search: {', '.join(map(format_radius, caps))}."
    certifiers = sorted({(row.certifier, row.settings_digest[:8], row.deploy) for row in rows})
    named = (
        f"{escape_markdown(c)} (settings {digest}, {escape_markdown(deploy)})"
        for c, digest, deploy in certifiers
    )
    yield f"Certifier: {', '.join(named)}."
    for guarantee in sorted({row.guarantee for row in rows}):
        yield f"Guarantee {escape_markdown(guarantee)}: {GUARANTEES[guarantee]}."
    epochs = {(row.method, row.recipe, row.variant, row.epochs) for row in rows}
    yield f"Epochs: {'; '.join(_epochs(*entry) for entry in sorted(epochs))}."
    yield (
        "clean and certified: mean over seeds ± sample standard deviation, percent of images. ACR: mean certified "
        "radius over all images, up to the cap, misclassified ones counting 0; incomplete where a radius is unknown."
    )
    yield "unknown (abstained included), falsified and failed (timeout or error) count images over all seeds."
    if not all(row.complete for row in rows):
        yield "A row with n of N images is incomplete: it stands below all complete rows and is not comparable to them."
    if any(row.published for row in rows):
        yield "Δ: measured minus published, in percentage points."
    yield _DERIVED


def _epochs(method: str, recipe: str, variant: str, epochs: Sequence[int]) -> str:
    shown = f"{recipe} ({variant})" if variant else recipe
    return f"{escape_markdown(method)} {escape_markdown(shown)} {', '.join(map(str, epochs))}"


def _pipe(headers: Sequence[str], lines: Sequence[Sequence[str]], align: Sequence[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def escape_markdown(text: str) -> str:
    """The text on one line, with nothing in it that Markdown, a table or HTML would act on."""
    line = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)


def printable(text: str) -> str:
    """The text on one line, without control or invisible characters."""
    return "".join(c if c.isprintable() else " " for c in text)


# Records -----------------------------------------------------------------------------------------------------------


def records(board: Board) -> list[dict[str, Any]]:
    """The board in full precision, one flat record per measured or published row; all have the same keys."""
    found = []
    for row in board.rows:
        found.append(_measured_record(board, row))
        found += [_published_record(board, row, published) for published in row.published]
    return found


def _common(board: Board, row: Row, kind: str) -> dict[str, Any]:
    return {
        "certbench_board": board.name,
        "protocol": board.protocol,
        "dataset": board.dataset,
        "norm": board.norm,
        "radius": board.radius.removeprefix("radius "),
        "kind": kind,
        "method": row.method,
        "recipe": row.recipe,
        "variant": row.variant,
        "model": row.model,
    }


def _measured_record(board: Board, row: Row) -> dict[str, Any]:
    return {
        **_common(board, row, "measured"),
        "certifier": row.certifier,
        "settings_digest": row.settings_digest,
        "guarantee": row.guarantee,
        "deploy": row.deploy,
        "cap": str(row.cap) if row.cap is not None else None,
        "epochs": " ".join(map(str, row.epochs)),
        "seeds": " ".join(map(str, row.seeds)),
        "run_ids": " ".join(row.run_ids),
        "images": row.images,
        "expected_images": row.expected,
        **_figures(row.clean, row.certified),
        "acr": row.acr.mean if row.acr else None,
        "acr_std": row.acr.deviation if row.acr else None,
        "acr_of_cap": row.acr_of_cap,
        **row.verdicts,
        "train_seconds": row.train_seconds,
        "certify_seconds": row.certify_seconds,
        "devices": "; ".join(row.devices),
        "source": None,
        "clean_difference": None,
        "certified_difference": None,
    }


def _published_record(board: Board, row: Row, published: Published) -> dict[str, Any]:
    return {
        **dict.fromkeys(_measured_record(board, row)),
        **_common(board, row, "published"),
        **_figures(published.clean, published.certified),
        "source": published.source,
        "clean_difference": published.clean_difference,
        "certified_difference": published.certified_difference,
    }


def _figures(clean: Figure | None, certified: Figure | None) -> dict[str, float | None]:
    return {
        "clean_accuracy": clean.mean if clean else None,
        "clean_accuracy_std": clean.deviation if clean else None,
        "certified_accuracy": certified.mean if certified else None,
        "certified_accuracy_std": certified.deviation if certified else None,
    }


def comma_separated(board: Board) -> str:
    """The board's records as CSV; numbers in the shortest form that reads back to the same value."""
    rows = records(board)
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([csv_cell(value) for value in row.values()] for row in rows)
    return sink.getvalue()


def csv_cell(value: str | float | None) -> str:
    """One cell; text that a spreadsheet would take for a formula gets a leading apostrophe."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = "".join(c if c.isprintable() or c == "\t" else " " for c in value)
    if text[:1] == "\t" or (text.lstrip()[:1] in tuple("=+-@") and not _NUMBER.fullmatch(text)):
        return f"'{text}"
    return text


# Terminal ----------------------------------------------------------------------------------------------------------


def marked(board: Board) -> list[list[str]]:
    """Lines for a terminal: control characters removed, the best clean and certified figures marked with a star."""
    best = {column: board.best(column) for column in ("clean", "certified")}
    lines = []
    place = -1
    for row, line in cells(board):
        shown = [printable(cell) for cell in line]
        if isinstance(row, Row):
            place += 1
            for column, at in (("clean", 7), ("certified", 8)):
                shown[at] += " *" if place in best[column] else ""
        lines.append(shown)
    return lines


def plain(board: Board) -> str:
    """The board as text for a terminal or a pipe."""
    align = ["left"] * _LEFT + ["right"] * (len(HEADERS) - _LEFT)
    table = tabulate(marked(board), headers=HEADERS, tablefmt="simple", colalign=align, disable_numparse=True)
    return f"{printable(board.name)} (protocol {printable(board.protocol)}; * best)\n\n{table}\n"
