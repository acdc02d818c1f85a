"""Rank ranges of the rows of one board, from paired tests on the same images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certbench.errors import DataError
from certbench.leaderboard.figures import Figure
from certbench.leaderboard.row import Row, Standing
from certbench.stats import bootstrap, paired
from certbench.stats.ranks import rank_ranges

Places = Sequence[int]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows with their standings by certified accuracy and by ACR, and with ACR's interval over images.

    Incomplete rows have no standing. Certified accuracy is compared among all complete rows: by McNemar's exact test
    where every row is one network, otherwise by the bootstrap over images nested in seeds. ACR is compared by the
    bootstrap, and only among rows of one budget (:attr:`certbench.leaderboard.row.Row.budget`).

    The complete rows are about the same images (:func:`check_images`).
    """
    found = list(rows)
    complete = [place for place, row in enumerate(rows) if row.complete]
    for place, standing in _by_certified(rows, complete).items():
        found[place] = replace(found[place], standing=standing)
    budgets: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place in complete:
        if rows[place].acr is not None:
            budgets[rows[place].budget].append(place)
    for places in budgets.values():
        for place, (standing, acr) in _by_acr(rows, places).items():
            found[place] = replace(found[place], acr_standing=standing, acr=acr)
    return found


def estimated(rows: Sequence[Row]) -> list[Row]:
    """The rows with ACR's interval over images and no standings, as those that are shown and not ranked."""
    found = list(rows)
    for place, row in enumerate(rows):
        if row.complete and row.acr is not None:
            values = [np.stack([entry.metrics.each.radius for entry in row.entries])]
            (nested,) = _nested(rows, [place], values)
            found[place] = replace(row, acr=replace(row.acr, interval=bootstrap.interval(nested.images)))
    return found


def check_images(rows: Sequence[Row]) -> None:
    """
    Raises:
        DataError: complete rows are not about the same images.
    """
    complete = [row for row in rows if row.complete]
    indices = [entry.metrics.each.index for row in complete for entry in row.entries]
    if any(not np.array_equal(index, indices[0]) for index in indices[1:]):
        raise DataError(
            f"complete rows of {complete[0].recipe} and others are about different images; no table is built of them"
        )


def _by_certified(rows: Sequence[Row], places: Places) -> dict[int, Standing]:
    if not places:
        return {}
    hits = [[entry.metrics.each.certified for entry in rows[place].entries] for place in places]
    if all(len(runs) == 1 for runs in hits):
        means = np.array([float(runs[0].mean()) for runs in hits])
        only = paired.only_first(np.stack([runs[0] for runs in hits]))
        p = paired.mcnemar(only, only.T)
    else:
        nested = _nested(rows, places, [np.stack(runs) for runs in hits])
        means, p = np.array([row.mean for row in nested]), bootstrap.p_values(nested)
    return _standings(places, means, p)


def _by_acr(rows: Sequence[Row], places: Places) -> dict[int, tuple[Standing, Figure]]:
    values = [np.stack([entry.metrics.each.radius for entry in rows[place].entries]) for place in places]
    nested = _nested(rows, places, values)
    means = np.array([row.mean for row in nested])
    standings = _standings(places, means, bootstrap.p_values(nested))
    return {
        place: (standings[place], replace(_acr(rows[place]), interval=bootstrap.interval(row.images)))
        for place, row in zip(places, nested, strict=True)
    }


def _nested(
    rows: Sequence[Row],
    places: Places,
    values: Sequence[NDArray[np.float64]] | Sequence[NDArray[np.bool_]],
) -> list[bootstrap.Nested]:
    together: Any = np.concatenate(values)  # of the one or the other type
    sampled = bootstrap.resample_images(together)
    ends = np.cumsum([len(runs) for runs in values])
    return [
        bootstrap.nest(sampled, list(range(end - len(runs), end)), key=" ".join(rows[place].run_ids))
        for place, runs, end in zip(places, values, ends, strict=True)
    ]


def _acr(row: Row) -> Figure:
    assert row.acr is not None  # only such rows are compared by it
    return row.acr


def _standings(places: Places, means: NDArray[np.float64], p: NDArray[np.float64]) -> dict[int, Standing]:
    ranges = rank_ranges(means, p)
    return {place: Standing(*ranks, of=len(places)) for place, ranks in zip(places, ranges, strict=True)}
