"""Measured beside published: the lines below a row, and the table that says of every published cell what became of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from certbench.errors import DataError
from certbench.leaderboard.figures import Figure, decimal
from certbench.leaderboard.published import Notes, PublishedFigure
from certbench.leaderboard.row import Row
from certbench.recipe import split_name

WITHIN = 2.0
"""Standard deviations within which a published figure counts as reproduced."""

Scale = Literal["published", "seeds", "images"]
State = Literal["reproduced", "off", "not run", "beside"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Compared:
    """One measured figure beside a published one; accuracies in percent, ``difference`` is measured minus published.

    ``deviations`` is the difference over the published standard deviation; where none is published, over that of our
    seeds, or else over that which drawing so many images has (``scale`` says which).
    """

    published: Figure
    measured: Figure
    difference: float
    deviations: float
    scale: Scale

    @property
    def reproduced(self) -> bool:
        return abs(self.deviations) <= WITHIN


@dataclass(frozen=True)
class Published:
    """Published figures for a row's setting from one source, by metric: ``clean``, ``certified``, ``acr``, or the
    radius of a certified accuracy. A metric that was not measured has no comparison, only the figure.

    ``because`` says why the row they stand under is no reproduction, see :func:`hindrance`."""

    source: str
    figures: Mapping[str, Figure]
    compared: Mapping[str, Compared]
    notes: tuple[str, ...] = ()
    because: str = ""

    @property
    def label(self) -> str:
        return _labelled(self.source, self.because)

    def difference(self, metric: str) -> float | None:
        return self.compared[metric].difference if metric in self.compared else None


@dataclass(frozen=True)
class Cell:
    """One line of the reproduction table: a published figure, and the row that speaks of it, if any was run.

    ``because`` says why a row may stand ``beside`` the figure but reproduces nothing, see :func:`hindrance`."""

    source: str
    figure: PublishedFigure
    value: Figure
    row: Row | None
    compared: Compared | None
    because: str = ""

    @property
    def state(self) -> State:
        if self.compared is None:
            return "not run"
        if self.because:
            return "beside"
        return "reproduced" if self.compared.reproduced else "off"

    @property
    def label(self) -> str:
        """The figure's source, and why its row is no reproduction, if so."""
        return _labelled(_cited(self.source, self.figure), self.because)


def _cited(source: str, figure: PublishedFigure) -> str:
    """Source and table, and on what the figure rests: the paper's text, or logs that were published."""
    return f"{source}, {figure.table} ({figure.basis})"


def _labelled(source: str, because: str) -> str:
    return f"{source} (beside, no reproduction: {because})" if because else source


def beside(row: Row, size: str, notes: Notes) -> tuple[Published, ...]:
    """What is published for a row: by its plugin's data, and by its recipes' ``[reference]`` where that says more."""
    by_source: dict[tuple[str, str], list[PublishedFigure]] = defaultdict(list)
    for source, figure in notes.figures():
        if speaks_of(figure, row, size):
            by_source[_cited(source, figure), hindrance(row, figure)].append(figure)
    found = [_published(source, row, figures, why) for (source, why), figures in sorted(by_source.items())]
    known = [{metric: figure.mean for metric, figure in each.figures.items()} for each in found]
    for reference in _references(row):
        figures = {metric: figure.mean for metric, figure in reference.figures.items()}
        if not any(figures.items() <= other.items() for other in known):
            found.append(replace(reference, because=hindrance(row)))
    return tuple(found)


def speaks_of(figure: PublishedFigure, row: Row, size: str) -> bool:
    """Whether a published figure is about a row's setting: of a row with overrides (an ablation) only one that names its
    recipe with exactly these."""
    run = row.run
    return (
        (figure.method, figure.model, figure.dataset) == (row.method, row.model, run["dataset"])
        and (figure.norm, figure.size) == (run["norm"], size)
        and (figure.epochs is None or (figure.epochs,) == row.epochs)
        and _names(figure.recipe, row.recipe)
    )


def _names(recipe: str | None, of_row: str) -> bool:
    """Whether a figure's recipe is that of a row; one that names none speaks of every recipe without overrides."""
    base, changes = _overrides(of_row)
    return not changes if recipe is None else _overrides(recipe) == (base, changes)


def _overrides(recipe: str) -> tuple[str, dict[str, str]]:
    """A recipe's name without its overrides, and these by key: their order says nothing, and the last of a key counts."""
    base, changes = split_name(recipe)
    return base, dict(change.partition("=")[::2] for change in changes)


def hindrance(row: Row, figure: PublishedFigure | None = None) -> str:
    """Why a row reproduces nothing, or not ``figure``, which is about its setting; empty where it may.

    Only what this harness made itself, by the certifier, guarantee and draws that the row's own recipe asks for, counts:
    certificates of somebody else, or made again by other means, are shown beside. So is every row where the figure says
    that its network was trained with other settings, and a row that is but a lower bound at the figure's radius.
    """
    why = _of_row(row)
    if not why and figure is not None and figure.other_settings:
        why = figure.differences or ""
    if not why and figure is not None and row.is_at_least(measure_of(figure)[0]):
        why = "its draws ended before that radius was decided"
    return why


def _of_row(row: Row) -> str:
    if row.submitter is not None:
        return f"submitted by {row.submitter}"
    asked = json.loads(row.run["recipe"]).get("certify") or {}
    certifier = asked.get("certifier") or row.certifier
    if row.certifier not in (certifier, row.method):  # a plugin's own certifier has its method's name
        return f"certified by {row.certifier}, where its recipe asks for {certifier}"
    for name, found in (("guarantee", row.guarantee), ("deploy", row.deploy)):
        if (asked.get(name) or found) != found:
            return f"its {name} is {found}, where its recipe asks for {asked[name]}"
    return _other_draws(row, asked.get("smoothing") or {})


def _other_draws(row: Row, asked: Mapping[str, Any]) -> str:
    if row.sampling is None or not asked:
        return ""
    n, alpha = asked.get("n", row.sampling.n[-1]), asked.get("failure_probability", row.sampling.alpha)
    fixed = row.run["protocol"].startswith("l2-fixed-")
    if row.sampling.alpha != alpha or row.sampling.n[-1] > n or (fixed and row.sampling.n != (n,)):
        return f"drawn otherwise than its recipe asks, n = {n} at alpha = {alpha:g}"
    return ""


def reproduction(rows: Sequence[tuple[str, Row]], notes: Notes) -> list[Cell]:
    """Every published cell, with the complete rows that speak of it; ``rows`` are those that stand, with their size.

    A cell that no row of our own reproduces is ``not run``, whatever stands beside it.
    """
    cells = []
    for source, figure in notes.figures():
        metric, value = measure_of(figure)
        found = [
            Cell(source, figure, value, row, compared, hindrance(row, figure))
            for size, row in rows
            if row.complete and speaks_of(figure, row, size)
            if (compared := compare(metric, value, row)) is not None
        ]
        own = [cell for cell in found if not cell.because]
        cells += own or [Cell(source, figure, value, None, None)]
        cells += [cell for cell in found if cell.because]
    return cells


def measure_of(figure: PublishedFigure) -> tuple[str, Figure]:
    """The metric a published cell is about, and its value as boards write it: errors become accuracies."""
    name = {"clean_error": "clean", "clean_accuracy": "clean", "acr": "acr"}.get(figure.metric, "certified")
    value = float(100 - decimal(figure.value)) if figure.metric.endswith("error") else float(figure.value)
    metric = f"{float(figure.at):g}" if figure.at is not None else name
    return metric, Figure(value, figure.spread)


def compare(metric: str, published: Figure, row: Row) -> Compared | None:
    """A published figure beside the row's own; None where the row has none."""
    measured = {"clean": row.clean, "certified": row.certified, "acr": row.acr, **row.at}.get(metric)
    if measured is None:
        return None
    difference = float(decimal(measured.mean) - decimal(published.mean))
    scale, deviation = _scale(metric, published, measured, row)
    deviations = difference / deviation if deviation else math.copysign(math.inf, difference)
    return Compared(published, measured, difference, 0.0 if difference == 0 else deviations, scale)


def _scale(metric: str, published: Figure, measured: Figure, row: Row) -> tuple[Scale, float]:
    if published.deviation:
        return "published", published.deviation
    if measured.deviation:
        return "seeds", measured.deviation
    if metric == "acr":
        low, high = measured.interval or (measured.mean, measured.mean)
        return "images", (high - low) / (2 * 1.959964)
    images = max(1, row.images)  # of a row that was never run nothing is known, not even this
    share = min(max(published.mean / 100, 0.5 / images), 1 - 0.5 / images)
    return "images", 100 * math.sqrt(share * (1 - share) / images)


def _published(source: str, row: Row, figures: Iterable[PublishedFigure], because: str) -> Published:
    found = dict(measure_of(figure) for figure in figures)
    notes = tuple(sorted({figure.differences for figure in figures if figure.differences}))
    return replace(_side_by_side(source, found, row, notes), because=because)


def _side_by_side(source: str, figures: Mapping[str, Figure], row: Row, notes: tuple[str, ...]) -> Published:
    compared = {metric: compare(metric, figure, row) for metric, figure in figures.items()}
    return Published(
        source, figures, {metric: each for metric, each in compared.items() if each is not None}, notes
    )


def _references(row: Row) -> list[Published]:
    """The figures that the recipes bring along; each distinct set once, since a correction may reach only some runs."""
    references = {
        json.dumps(reference, sort_keys=True): reference
        for entry in row.entries
        if (reference := json.loads(entry.run["recipe"]).get("reference"))
    }
    found = []
    for _, reference in sorted(references.items()):
        figures = {
            metric: figure
            for metric, name in (("clean", "clean_error"), ("certified", "certified_error"))
            if (figure := _accuracy(reference, name, row.run)) is not None
        }
        found.append(_side_by_side(str(reference.get("source", "")), figures, row, ()))
    return found


def _accuracy(reference: Mapping[str, Any], name: str, run: Mapping[str, Any]) -> Figure | None:
    error, spread = reference.get(name), reference.get(f"{name}_spread")
    if error is None:
        return None
    if not all(isinstance(v, int | float) and 0 <= v <= 100 for v in (error, spread) if v is not None):
        raise DataError(f"run {run['run_id']}: the published {name} in its recipe is not a percentage")
    return Figure(float(100 - decimal(error)), None if spread is None else float(spread))
