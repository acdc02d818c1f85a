"""Boards and trade-offs as flat records in full precision, for programs: JSON of ``leaderboard show``, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from certbench.leaderboard.board import Board
from certbench.leaderboard.columns import familywise, proved_by
from certbench.leaderboard.comparison import Cell, Published
from certbench.leaderboard.escape import csv_cell
from certbench.leaderboard.figures import Figure
from certbench.leaderboard.row import Row
from certbench.leaderboard.tables import metric_name
from certbench.leaderboard.tradeoff import Tradeoff

CSV_MARKERS = ("certbench_board,", "certbench_state,", "certbench_tradeoff,")
"""How every derived CSV file begins."""


def records(board: Board) -> list[dict[str, Any]]:
    """The board in full precision, one flat record per measured or published row; all have the same keys."""
    found = []
    for kind, rows in (("measured", board.rows), ("swept", board.swept), ("voided", board.voided)):
        for row in rows:
            found.append(_measured(board, row, kind))
            found += [_published(board, row, published) for published in row.published]
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


def _measured(board: Board, row: Row, kind: str) -> dict[str, Any]:
    audit, sampling = row.audit, row.sampling
    standing = board.standing(row)
    return {
        **_common(board, row, kind),
        "certifier": row.certifier,
        "settings_digest": row.settings_digest,
        "guarantee": row.guarantee,
        "deploy": row.deploy,
        "cap": str(row.cap) if row.cap is not None else None,
        "submitter": row.submitter,
        "rechecked": row.rechecked if row.submitter is not None else None,
        "epochs": " ".join(map(str, row.epochs)),
        "seeds": " ".join(map(str, row.seeds)),
        "run_ids": " ".join(row.run_ids),
        "images": row.images,
        "expected_images": row.expected,
        "rank_first": standing.first if standing and not standing.alone else None,
        "rank_last": standing.last if standing and not standing.alone else None,
        "rank_of": standing.of if standing else None,
        **_figures(board, {"clean": row.clean, "certified": row.certified, "acr": row.acr, **row.at}),
        **_interval("clean_accuracy", row.clean),
        **_interval("certified_accuracy", row.certified),
        **_interval("acr", row.acr),
        "lower_bounds_at": " ".join(radius for radius in board.radii if row.is_at_least(radius)) or None,
        "acr_of_cap": row.acr_of_cap,
        "attacked_accuracy": row.attacked.mean if row.attacked else None,
        "attacked_accuracy_std": row.attacked.deviation if row.attacked else None,
        "audited_seeds": audit.seeds if audit else 0,
        "audited": audit.tried if audit else None,
        "refuted": audit.refuted if audit else None,
        "refuted_in_float": audit.refuted_in_float if audit else None,
        "attacks": " ".join(f"{name}:{digest}" for name, digest, _ in audit.attacks) if audit else None,
        "alpha": sampling.alpha if sampling else None,
        "alpha_of_all": familywise(row),
        "n": " ".join(map(str, sampling.n)) if sampling else None,
        "mean_draws": sampling.draws if sampling else None,
        **row.verdicts,
        "proved_by": proved_by(row) if not board.smoothed else None,
        "train_seconds": row.train_seconds,
        "certify_seconds": row.certify_seconds,
        "devices": "; ".join(row.devices),
        "source": None,
        "clean_difference": None,
        "certified_difference": None,
        "acr_difference": None,
    }


def _published(board: Board, row: Row, published: Published) -> dict[str, Any]:
    return {
        **dict.fromkeys(_measured(board, row, "published")),
        **_common(board, row, "published"),
        **_figures(board, published.figures),
        "source": published.label,
        **{f"{metric}_difference": published.difference(metric) for metric in ("clean", "certified", "acr")},
    }


def _figures(board: Board, figures: Mapping[str, Figure | None]) -> dict[str, float | None]:
    """Mean and spread of every figure the board has columns for."""
    names = {"clean": "clean_accuracy", "certified": "certified_accuracy", "acr": "acr"}
    names |= {radius: f"certified_at_{radius}" for radius in board.radii}
    found: dict[str, float | None] = {}
    for metric, name in names.items():
        figure = figures.get(metric)
        found[name] = figure.mean if figure else None
        found[f"{name}_std"] = figure.deviation if figure else None
    return found


def _interval(name: str, figure: Figure | None) -> dict[str, float | None]:
    low, high = figure.interval if figure and figure.interval else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def comma_separated(board: Board) -> str:
    """The board's records as CSV; numbers in the shortest form that reads back to the same value."""
    return _csv(records(board))


def reproduction(cells: Sequence[Cell]) -> str:
    """The reproduction table as CSV."""
    return _csv([_cell(cell) for cell in cells])


def _cell(cell: Cell) -> dict[str, Any]:
    figure, found = cell.figure, cell.compared
    return {
        "certbench_state": cell.state,
        "method": figure.method,
        "dataset": figure.dataset,
        "norm": figure.norm,
        "size": figure.size.partition(" ")[2],
        "model": figure.model,
        "epochs": figure.epochs,
        "figure": metric_name(figure),
        "source": cell.source,
        "table": figure.table,
        "basis": figure.basis,
        "differences": figure.differences,
        "published": cell.value.mean,
        "published_std": cell.value.deviation,
        "measured": found.measured.mean if found else None,
        "measured_std": found.measured.deviation if found else None,
        "difference": found.difference if found else None,
        "deviations": found.deviations if found else None,
        "deviations_of": found.scale if found else None,
        "recipe": cell.row.recipe if cell.row else None,
        "run_ids": " ".join(cell.row.run_ids) if cell.row else None,
        "because": cell.because or None,
    }


def tradeoffs(all_found: Sequence[Tradeoff]) -> str:
    """The points of every trade-off as CSV, one line for each seed; accuracy in percent, as in the boards' CSV."""
    return _csv([
        {
            "certbench_tradeoff": number,
            "dataset": found.terms.dataset,
            "norm": found.terms.norm,
            "model": found.terms.model,
            "cap": found.terms.cap,
            "verifier": found.terms.verifier,
            "guarantee": found.terms.guarantee,
            "tolerance": found.terms.tolerance,
            "decided_at": found.terms.decided_at,
            "method": front.method,
            "setting": point.setting,
            "epochs": " ".join(map(str, point.epochs)),
            "seed": one.seed,
            "run_id": one.run_id,
            "clean_accuracy": round(100 * one.accuracy, 10),  # without the last digits of a product
            "acr_of_cap": one.robustness,
            "mean_on_front": point.on_front,
        }
        for number, found in enumerate(all_found, 1)
        for front in found.fronts
        for point in front.points
        for one in point.of_seeds
    ])  # fmt: skip


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([csv_cell(value) for value in row.values()] for row in rows)
    return sink.getvalue()
