"""What the page's template shows of boards, methods and published figures: plain values, escaped by the template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from certbench.leaderboard import columns as c
from certbench.leaderboard.board import Board
from certbench.leaderboard.comparison import Cell, Published
from certbench.leaderboard.escape import printable
from certbench.leaderboard.figures import Figure
from certbench.leaderboard.foot import SWEPT, foot, voided
from certbench.leaderboard.page.charts import charts, label, slot
from certbench.leaderboard.page.fronts import front
from certbench.leaderboard.page.recipes import commands, recipe_toml
from certbench.leaderboard.published import Notes
from certbench.leaderboard.row import Row
from certbench.leaderboard.tables import REPRODUCTION, leader, reproduction_line, states, unranked
from certbench.leaderboard.tradeoff import Tradeoff
from certbench.results.rules import VERDICTS
from certbench.threat import format_radius

GUARANTEES = {"float_sound": "float-sound", "real_arith": "real arithmetic", "statistical": "statistical"}
SHOWN = {
    "rank": "rank",
    "clean %": "clean %",
    "certified %": "certified %",
    "attacked %": "attacked %",
    "ACR": "ACR",
    "audit": "refuted",
    "abstained %": "abstained %",
    "n": "draws n",
    "train s": "train s",
    "certify s": "certify s",
}
"""The numeric columns of the page's tables among those of :func:`certbench.leaderboard.columns.columns`; the rest is in
a row's details."""


def _audit_short(row: Row) -> str:
    if row.audit is None:
        return "not audited"
    in_float = f", {row.audit.refuted_in_float} in float" if row.audit.refuted_in_float else ""
    return f"{row.audit.refuted}{in_float} of {row.audit.tried:,}"


def _duration(seconds: float | None) -> str:
    return c.number(seconds, 1) if seconds is None or seconds < 100 else f"{seconds:,.0f}"


SHORTER: dict[str, Callable[[Row], str]] = {
    "audit": _audit_short,
    "train s": lambda row: _duration(row.train_seconds),
    "certify s": lambda row: _duration(row.certify_seconds),
}
"""Columns that the page words more briefly than the plain tables; the row's details have them in full."""


def page(
    boards: Sequence[Board], tradeoffs: Sequence[Tradeoff], cells: Sequence[Cell], notes: Notes
) -> dict[str, Any]:
    return {
        "boards": [_board(board, notes) for board in boards],
        "tradeoffs": list(map(front, tradeoffs)),
        "reproduction": _reproduction(cells),
    }


def _board(board: Board, notes: Notes) -> dict[str, Any]:
    shown = [
        column
        for column in c.columns(board)
        if column.header in SHOWN or column.header.startswith(("≥", ">"))
    ]
    rows = [_row(board, row, place, shown) for place, row in enumerate(board.rows)]
    return {
        "name": board.name,
        "title": board.title,
        "dataset": board.dataset,
        "norm": board.norm,
        "size": board.radius,
        "protocol": board.protocol,
        "leader": leader(board),
        "headers": [{"name": SHOWN.get(column.header, column.header)} for column in shown],
        "rows": rows,
        "swept_words": SWEPT,
        "swept": [_row(board, row, -1, unranked(shown)) for row in board.swept],
        "swept_headers": [SHOWN.get(column.header, column.header) for column in unranked(shown)],
        "guarantees": sorted({row["guarantee"] for row in rows}),
        "voided": [{"row": _row(board, row, -1, shown), "why": voided(row)} for row in board.voided],
        "charts": charts(board),
        "methods": _methods(board, notes),
        "foot": foot(board),
    }


def _row(board: Board, row: Row, place: int, shown: Sequence[c.Column]) -> dict[str, Any]:
    best = {name for name in ("clean", "certified", "acr") if place in board.best(name)}
    return {
        "id": f"{board.name}-{row.run_ids[0]}-{row.settings_digest[:8]}",
        "label": label(place) if place >= 0 else "",
        "slot": slot(place) if place >= 0 else 0,
        "method": row.method,
        "recipe": c.recipe(row),
        "model": row.model,
        "certifier": row.certifier,
        "submitter": c.submitter(row),
        "guarantee": row.guarantee,
        "guarantee_words": GUARANTEES[row.guarantee] + ("" if row.deploy == "float32" else f", {row.deploy}"),
        "incomplete": "" if row.complete else c.images(row),
        "tied": place in board.tied(),
        "cells": [_cell(row, column, best, board) for column in shown],
        "reach": _reach(row),
        "published": [_published(published, shown) for published in row.published],
        "details": _details(row, board),
        "verdicts": [(verdict, row.verdicts[verdict]) for verdict in VERDICTS if row.verdicts[verdict]],
    }


def _cell(row: Row, column: c.Column, best: set[str], board: Board) -> dict[str, Any]:
    """A cell's text, cut at its spread, and the number it is sorted by."""
    text, _, spread = SHORTER.get(column.header, column.measured)(row).partition(" ± ")
    return {
        "text": text,
        "spread": spread,
        "sort": _sort_key(row, column, board),
        "best": column.best in best,
        "header": SHOWN.get(column.header, column.header),
        "bar": column.header == "certified %",
        "audit": _audit_state(row) if column.header == "audit" else "",
    }


def _sort_key(row: Row, column: c.Column, board: Board) -> str:
    """The number a column is sorted by; empty where there is none, which sorts last."""
    values: dict[str, float | None] = {
        "rank": standing.first if (standing := board.standing(row)) and not standing.alone else None,
        "clean %": row.clean.mean,
        "certified %": row.certified.mean,
        "attacked %": row.attacked.mean if row.attacked else None,
        "ACR": row.acr.mean if row.acr else None,
        "audit": row.audit.tried if row.audit else None,
        "n": row.sampling.n[-1] if row.sampling else None,
        "train s": row.train_seconds,
        "certify s": row.certify_seconds,
        "abstained %": row.verdicts["abstain"],
        **{_radius_header(radius): figure.mean for radius, figure in row.at.items()},
    }
    value = values.get(column.header)
    return "" if value is None else repr(value)


def _radius_header(radius: str) -> str:
    return f"≥ {radius} %" if radius != "0" else "> 0 %"


def _audit_state(row: Row) -> str:
    if row.audit is None:
        return "none"
    return "refuted" if row.audit.refuted else "limited" if row.audit.limits else "held"


def _reach(row: Row) -> dict[str, str] | None:
    """Certified, attacked and clean accuracy for the bar behind a row, in percent."""
    if row.guarantee == "statistical":
        return None
    attacked = row.attacked.mean if row.attacked else row.certified.mean
    return {
        "certified": f"{row.certified.mean:.2f}",
        "attacked": f"{attacked:.2f}",
        "clean": f"{row.clean.mean:.2f}",
    }


def _published(published: Published, shown: Sequence[c.Column]) -> dict[str, Any]:
    """A published line in the row's own columns, each figure with its difference."""
    metrics = {"clean %": "clean", "certified %": "certified", "ACR": "acr"}
    cells = []
    for column in shown:
        metric = metrics.get(column.header, column.header.strip(">≥ %"))
        found = published.compared.get(metric)
        cells.append(
            {
                "header": SHOWN.get(column.header, column.header),
                "text": column.published(published),
                "difference": c.compared(published, metric, 4 if metric == "acr" else 2),
                "state": "" if found is None or published.because else "near" if found.reproduced else "far",
            }
        )
    return {"source": published.label, "cells": cells}


def _details(row: Row, board: Board) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (name, value) that a row unfolds to."""
    run = row.run
    more = c.AT_LEAST if row.is_at_least("0") else ""
    figures = [
        ("clean", _with_interval(row.clean, 2, "%") + more),
        ("certified", _with_interval(row.certified, 2, "%") + more),
        ("attacked", _with_interval(row.attacked, 2, "%")),
        ("ACR", _with_interval(row.acr, 4, "")),
        ("radius cap", format_radius(row.cap) if row.cap else ""),
        ("rank, certified", "" if board.smoothed else c.rank(row.standing, board.ranked)),
        ("rank, ACR", c.rank(row.acr_standing, board.ranked)),
    ]
    figures += [(f"proved by {proof}", f"{count:,} images") for proof, count in row.proofs.items() if proof]
    groups = [
        ("Figures [95 % over images]", figures),
        ("Audit", _audit(row)),
        ("Draws", _draws(row)),
        (
            "Provenance",
            [
                ("runs", ", ".join(row.run_ids)),
                ("seeds", ", ".join(map(str, row.seeds))),
                ("submitted by", c.submitter(row)),
                ("certifier", f"{row.certifier}, settings {row.settings_digest[:8]}"),
                ("network", f"{row.model}, {run['parameters']:,} parameters"),
                ("checkpoint", run["checkpoint_digest"][:16]),
                ("structure", run["structure"] or ""),
                ("teacher", (run["teacher_digest"] or "")[:16]),
                ("data", run["dataset_digest"][:16]),
                ("plugin", f"{run['plugin']} {run['plugin_version']}"),
                ("code", run["code_revision"] or ""),
                ("versions", f"certbench {run['certbench_version']}, torch {run['torch_version']}, Python {run['python_version']}"),
                ("epochs", ", ".join(map(str, row.epochs))),
                ("training", _seconds(row.train_seconds)),
                ("certification", _seconds(row.certify_seconds)),
                ("devices", "; ".join(row.devices)),
            ],
        ),
    ]  # fmt: skip
    kept = [(title, [(name, printable(value)) for name, value in pairs if value]) for title, pairs in groups]
    return [(title, pairs) for title, pairs in kept if pairs]


def _with_interval(figure: Figure | None, digits: int, unit: str) -> str:
    if figure is None:
        return ""
    interval = c.interval(figure, digits)
    return f"{c.figure(figure, digits)}{unit}" + (f" [{interval}]" if interval else "")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} s a seed"


def _audit(row: Row) -> list[tuple[str, str]]:
    if row.audit is None:
        return [("state", "not audited")]
    found = [("certificates attacked", f"{row.audit.tried:,}"), ("refuted", f"{row.audit.refuted:,}")]
    if row.audit.refuted_in_float:
        found.append(("refuted in float only", f"{row.audit.refuted_in_float:,}"))
    found += [
        (name, f"{summary} (settings {digest[:8]})" if summary else f"settings {digest[:8]}")
        for name, digest, summary in row.audit.attacks
    ]
    return found + [("limit", limit) for limit in row.audit.limits]


def _draws(row: Row) -> list[tuple[str, str]]:
    if row.sampling is None:
        return []
    return [
        ("sigma", f"{row.sampling.sigma:g}"),
        ("alpha, for each image", f"{row.sampling.alpha:g}"),
        ("alpha, for all together", f"{c.familywise(row):g}"),
        ("draws n", c.budget(row)),
        ("mean draws of an image", c.number(row.sampling.draws, 0)),
        ("exact noise", "yes" if row.sampling.exact_noise else "no"),
    ]


def _methods(board: Board, notes: Notes) -> list[dict[str, Any]]:
    """A card for every method of a board, with a recipe for each of its rows."""
    rows = board.all_rows
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        card = notes.methods.get(method)
        own = [row for row in rows if row.method == method]
        recipes: dict[str, dict[str, Any]] = {}
        for row in own:
            recipes.setdefault(
                c.recipe(row), {"name": c.recipe(row), "toml": recipe_toml(row), "commands": commands(row)}
            )
        found.append(
            {
                "name": method,
                "summary": card.summary if card else "",
                "paper": card.paper if card else "",
                "limits": card.limits if card else "",
                "plugin": own[0].run["plugin"],
                "guarantees": sorted({GUARANTEES[row.guarantee] for row in own}),
                "recipes": list(recipes.values()),
            }
        )
    return found


def _reproduction(cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "headers": REPRODUCTION,
        "rows": [
            {
                "state": cell.state,
                "cells": reproduction_line(cell)[1:],
                "differences": cell.figure.differences,
            }
            for cell in cells
        ],
        "counts": states(cells),
    }
