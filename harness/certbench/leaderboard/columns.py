"""The columns of a board as plain text: which there are, and what stands in them for measured and published lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from certbench.leaderboard.board import Board
from certbench.leaderboard.comparison import Published
from certbench.leaderboard.figures import Figure
from certbench.leaderboard.row import Row, Standing
from certbench.stats.smoothing import familywise_level

Line = Row | Published

STEPS = 6
"""Steps of a certifier that a cell names; the ladders there are have no more that prove much."""
AT_LEAST = " +"
"""Behind a certified accuracy that is a lower bound of what more draws would have found."""


@dataclass(frozen=True)
class Column:
    """``kind`` is ``text`` or ``number``, by which it is set and sorted; ``best`` names the figure it shows, if any."""

    header: str
    measured: Callable[[Row], str]
    published: Callable[[Published], str] = lambda _: ""
    kind: str = "number"
    best: str | None = None


def columns(board: Board) -> list[Column]:
    """The columns of a board, those of smoothed classifiers with the certified accuracy at radii."""
    names = [
        Column("method", lambda row: row.method, lambda _: "published", kind="text"),
        Column("recipe", recipe, lambda published: published.label, kind="text"),
        Column("model", lambda row: row.model, kind="text"),
        Column("certifier", lambda row: row.certifier, kind="text"),
        Column("guarantee", guarantee, kind="text"),
    ]
    if any(row.submitter is not None for row in board.all_rows):
        names.append(Column("submitted by", submitter, kind="text"))
    names += [
        Column("seeds", lambda row: str(len(row.seeds))),
        Column("images", images),
        Column("rank", lambda row: rank(board.standing(row), board.ranked)),
    ]
    return [*names, *(_smoothed(board) if board.smoothed else _bounded(board)), *_COST, *_differences(board)]


def _bounded(board: Board) -> list[Column]:
    return [
        Column("clean %", lambda row: percent(row.clean), _published("clean", 2), best="clean"),
        Column(
            "certified %", lambda row: percent(row.certified), _published("certified", 2), best="certified"
        ),
        *([Column("proved by %", proved_by)] if several_steps(board) else []),
        Column("attacked %", lambda row: percent(row.attacked)),
        Column("audit", audit),
        Column("ACR", lambda row: figure(row.acr, 4) or "incomplete", _published("acr", 4)),
        Column("ACR/cap", lambda row: number(row.acr_of_cap, 3)),
        Column("unknown", lambda row: str(row.verdicts["unknown"] + row.verdicts["abstain"])),
        Column("falsified", lambda row: str(row.verdicts["falsified"])),
        Column("failed", failed),
    ]


def _smoothed(board: Board) -> list[Column]:
    at = [
        Column(f"≥ {radius} %" if radius != "0" else "> 0 %", _at(radius), _published(radius, 2))
        for radius in board.radii
    ]
    return [
        Column("ACR", lambda row: figure(row.acr, 4) or "incomplete", _published("acr", 4), best="acr"),
        Column("audit", audit),
        *at,
        Column("alpha", lambda row: f"{row.sampling.alpha:g}" if row.sampling else ""),
        Column("alpha of all", lambda row: f"{of_all:g}" if (of_all := familywise(row)) else ""),
        Column("n", budget),
        Column("mean draws", lambda row: number(row.sampling.draws if row.sampling else None, 0)),
        Column("abstained %", abstained),
        Column("attacked %", lambda row: percent(row.attacked)),
        Column("failed", failed),
    ]


def _at(radius: str) -> Callable[[Row], str]:
    return lambda row: percent(row.at.get(radius)) + (AT_LEAST if row.is_at_least(radius) else "")


def _published(metric: str, digits: int) -> Callable[[Published], str]:
    return lambda published: figure(published.figures.get(metric), digits)


_COST = [
    Column("train s", lambda row: number(row.train_seconds, 1)),
    Column("certify s", lambda row: number(row.certify_seconds, 1)),
    Column("device", lambda row: "; ".join(row.devices)),
]


def _differences(board: Board) -> list[Column]:
    def difference(metric: str, digits: int) -> Callable[[Published], str]:
        return lambda published: compared(published, metric, digits)

    shown = (
        [("Δ ACR", "acr", 4)]
        if board.smoothed
        else [("Δ clean", "clean", 2), ("Δ certified", "certified", 2)]
    )
    return [Column(header, lambda _: "", difference(metric, digits)) for header, metric, digits in shown]


def lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of a table: each measured row followed by its published figures."""
    found: list[Line] = []
    for row in rows:
        found += [row, *row.published]
    return found


def cells(line: Line, shown: Sequence[Column]) -> list[str]:
    """One line of a table as plain text."""
    if isinstance(line, Row):
        return [column.measured(line) for column in shown]
    return [column.published(line) for column in shown]


# What stands in a cell ---------------------------------------------------------------------------------------------


def recipe(row: Row) -> str:
    return f"{row.recipe} ({row.variant})" if row.variant else row.recipe


def guarantee(row: Row) -> str:
    return row.guarantee if row.deploy == "float32" else f"{row.guarantee} ({row.deploy})"


def submitter(row: Row) -> str:
    if row.submitter is None:
        return ""
    return f"{row.submitter} ({f'{row.rechecked} re-checked' if row.rechecked else 'not re-checked'})"


def images(row: Row) -> str:
    return str(row.images) if row.complete else f"{row.images} of {row.expected}"


def rank(standing: Standing | None, among: int) -> str:
    """``1``, or ``1–3`` where the comparisons leave it open; ``1 of 3`` where it was compared with fewer than the
    ``among`` rows that are ranked, ``alone`` where with none."""
    if standing is None:
        return ""
    if standing.alone:
        return "alone"
    shown = str(standing.first) if standing.first == standing.last else f"{standing.first}–{standing.last}"
    return shown if standing.of == among else f"{shown} of {standing.of}"


def audit(row: Row) -> str:
    found = row.audit
    if found is None:
        return "not audited"
    in_float = f" ({found.refuted_in_float} in float)" if found.refuted_in_float else ""
    seeds = "" if found.seeds == len(row.seeds) else f", {found.seeds} of {len(row.seeds)} seeds"
    unable = ", none can be confirmed" if found.limits else ""
    return f"refuted {found.refuted}{in_float} of {found.tried}{seeds}{unable}"


def steps(row: Row) -> dict[str, int]:
    """How many images each step proved at the recipe's radius, most first; the steps beyond :data:`STEPS` as one.

    What only raised a radius follows a semicolon in rows.
    """
    found: Counter[str] = Counter()
    for proof, count in row.proofs.items():
        found[proof.split(";")[0]] += count
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[STEPS:])
    return dict(ranked[:STEPS]) | ({"others": rest} if rest else {})


def several_steps(board: Board) -> bool:
    """Whether any row's certificates were proved in more than one way."""
    return any(len(steps(row)) > 1 for row in board.all_rows)


def proved_by(row: Row) -> str:
    """``ibp 61.20, crown 3.45``: the shares of all images that each step proved, in percent."""
    total = sum(row.verdicts.values())
    return ", ".join(f"{step} {100 * count / total:.2f}" for step, count in steps(row).items())


def familywise(row: Row) -> float | None:
    """A bound on the probability that any certificate of a run is wrong; of seeds with other numbers of images, of the run
    with most."""
    images = max(entry.metrics.decided for entry in row.entries)
    return familywise_level(row.sampling.alpha, images) if row.sampling else None


def failed(row: Row) -> str:
    return str(row.verdicts["timeout"] + row.verdicts["error"])


def budget(row: Row) -> str:
    return " to ".join(f"{n:,}" for n in row.sampling.n) if row.sampling else ""


def abstained(row: Row) -> str:
    total = sum(row.verdicts.values())
    return number(100 * row.verdicts["abstain"] / total, 2) if total else ""


def percent(value: Figure | None) -> str:
    return figure(value, 2)


def figure(value: Figure | None, digits: int) -> str:
    if value is None:
        return ""
    spread = f" ± {value.deviation:.{digits}f}" if value.deviation is not None else ""
    return f"{value.mean:.{digits}f}{spread}"


def interval(value: Figure | None, digits: int) -> str:
    if value is None or value.interval is None:
        return ""
    return f"{value.interval[0]:.{digits}f}–{value.interval[1]:.{digits}f}"


def number(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def compared(published: Published, metric: str, digits: int) -> str:
    """``+1.20`` or, where the paper has a standard deviation, ``+1.20 (+2.5 sd)``."""
    found = published.compared.get(metric)
    if found is None:
        return ""
    shown = f"{found.difference:+.{digits}f}"
    return f"{shown} ({found.deviations:+.1f} sd)" if found.scale == "published" else shown
