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

from certbench.leaderboard.board import Audited, Board, Figure, Published, Row
from certbench.threat import format_radius

MARKER = "<!-- certbench: derived from rows; do not edit -->"
"""The first line of every derived Markdown file."""
CSV_MARKER = "certbench_board,"
"""How every derived CSV file begins."""

GUARANTEES = {
    "real_arith": "proved in real arithmetic, computed in floating point; round-off of the computation is not covered",
    "float_sound": "proved for every evaluation of the deployed network at the stated precision; assumed: dot products "
    "are sums of products in any order (no Winograd, Fourier or Strassen kernels; cuDNN, NNPACK and reduced-precision "
    "reductions off), round to nearest in the bounds' own float64; see docs/float-soundness.md",
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
    "attacked %",
    "audit",
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


def cells(rows: Iterable[Row]) -> list[tuple[Row | Published, list[str]]]:
    """Lines of plain text under :data:`HEADERS`, each measured row followed by its published figures."""
    lines: list[tuple[Row | Published, list[str]]] = []
    for row in rows:
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
        _percent(row.attacked),
        _audit(row),
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


def _audit(row: Row) -> str:
    audit = row.audit
    if audit is None:
        return "not audited"
    in_float = f" ({audit.refuted_in_float} in float)" if audit.refuted_in_float else ""
    seeds = "" if audit.seeds == len(row.seeds) else f", {audit.seeds} of {len(row.seeds)} seeds"
    return f"refuted {audit.refuted}{in_float} of {audit.tried}{seeds}"


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
    foot = "\n".join(f"* {line}" for line in _foot(board))
    title = escape_markdown(board.title)
    parts = [MARKER, f"# {title}", _markdown_table(board.rows) if board.rows else "No row stands."]
    if board.voided:
        why = "\n".join(f"* {escape_markdown(_voided(row))}" for row in board.voided)
        parts += ["## Voided", _VOIDED, _markdown_table(board.voided), why, "## Notes"]
    return "\n\n".join([*parts, foot]) + "\n"


def _markdown_table(rows: Iterable[Row]) -> str:
    lines = [[escape_markdown(cell) for cell in line] for _, line in cells(rows)]
    return _pipe(HEADERS, lines, ["left"] * _LEFT + ["right"] * (len(HEADERS) - _LEFT))


_VOIDED = "An attack refuted at least one proof of these rows, so no figure of theirs counts and they are not ranked."


def _voided(row: Row) -> str:
    assert row.audit is not None  # a row is voided by its audit
    return (
        f"{row.method}, {row.recipe}: {row.audit.refuted} refuted of {row.audit.tried} certificates, in run "
        f"{', '.join(row.audit.refuted_runs)}, attacked with {_attacks(row.audit)}."
    )


def _attacks(audit: Audited) -> str:
    return ", ".join(f"{name} (settings {digest[:8]})" for name, digest in audit.attacks)


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
    rows = (*board.rows, *board.voided)
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
    yield from _audit_foot(rows)
    yield "unknown (abstained included), falsified and failed (timeout or error) count images over all seeds."
    if not all(row.complete for row in rows):
        yield "A row with n of N images is incomplete: it stands below all complete rows and is not comparable to them."
    if any(row.published for row in rows):
        yield "Δ: measured minus published, in percentage points."
    yield _DERIVED


def _audit_foot(rows: Sequence[Row]) -> Iterable[str]:
    attacks = sorted({attack for row in rows if row.audit for attack in row.audit.attacks})
    if attacks:
        named = ", ".join(f"{escape_markdown(name)} (settings {digest[:8]})" for name, digest in attacks)
        yield f"Attacked with {named}."
        yield (
            "attacked: images that are correct and withstood every attack at the table's radius, percent; empty unless "
            "all correct ones were attacked. certified is at most attacked, and attacked at most clean."
        )
        yield (
            "audit: refuted k of n, n certificates attacked at their own radius. A witness counts if it holds at the "
            "level of the guarantee; one that only floating point sees is counted as in float and voids nothing. What "
            "was not refuted is not proved by that."
        )
        yield "An image that the certifier left unknown and an attack broke counts as falsified."
    if any(row.audit is None for row in rows):
        yield "not audited: no attack on this row's certificates is recorded; see `certbench audit`."


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
    for row in (*board.rows, *board.voided):
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
        **_common(board, row, "voided" if row.void else "measured"),
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
        "attacked_accuracy": row.attacked.mean if row.attacked else None,
        "attacked_accuracy_std": row.attacked.deviation if row.attacked else None,
        "audited_seeds": row.audit.seeds if row.audit else 0,
        "audited": row.audit.tried if row.audit else None,
        "refuted": row.audit.refuted if row.audit else None,
        "refuted_in_float": row.audit.refuted_in_float if row.audit else None,
        "attacks": " ".join(f"{name}:{digest}" for name, digest in row.audit.attacks) if row.audit else None,
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
    for row, line in cells(board.rows):
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
    lines = marked(board)
    table = "No row stands."
    if lines:
        table = tabulate(lines, headers=HEADERS, tablefmt="simple", colalign=align, disable_numparse=True)
    below = "".join(f"\n{line}" for line in voided(board))
    return f"{printable(board.name)} (protocol {printable(board.protocol)}; * best)\n\n{table}\n{below}"


def voided(board: Board) -> list[str]:
    """What stands below a board in a terminal: a line for every voided row, none where there is none."""
    return [f"Voided: {printable(_voided(row))}" for row in board.voided]
