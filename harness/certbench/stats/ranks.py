"""Ranks that say no more than the tests do: a range for every row, equal or overlapping where nothing is decided."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from certbench.stats.paired import holm

LEVEL = 0.05
"""Of all the comparisons of one table together."""


def rank_ranges(
    means: NDArray[np.float64], p: NDArray[np.float64], level: float = LEVEL
) -> list[tuple[int, int]]:
    """For each row [1 + number significantly better, K - number significantly worse], of K rows.

    ``p`` holds the p-value of every pair, as a symmetric matrix; pairs are corrected together by Holm's method. A row
    is better if its mean is larger.
    """
    rows = len(means)
    upper = np.triu_indices(rows, 1)
    significant = np.zeros((rows, rows), dtype=bool)
    significant[upper] = holm(p[upper]) <= level
    significant |= significant.T
    worse = significant & (means[:, None] < means[None, :])
    better = significant & (means[:, None] > means[None, :])
    return [
        (1 + int(above), rows - int(below))
        for above, below in zip(worse.sum(axis=1), better.sum(axis=1), strict=True)
    ]
