"""Whether two counts of one event contradict each other: hits in draws that were made apart from each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certbench.stats.binomial import lower_bound, upper_bound
from certbench.stats.evalue import anytime_lower_bound

Floats = NDArray[np.float64]
Counts = tuple[ArrayLike, ArrayLike]
"""k hits in n draws, arrays of one entry per image."""


def contradict(one: Counts, other: Counts, same: ArrayLike, level: float, anytime: bool) -> NDArray[np.bool_]:
    """Whether two counts cannot both be right, for each image with probability ``level`` at most where they are.

    Each count leaves an exact interval for its probability, missed with probability ``level / 2``: Clopper and Pearson's,
    or with ``anytime`` one that holds after every draw, for n chosen by a rule that saw the draws. Where both count the
    ``same`` class the intervals must meet; else they count two classes, whose probabilities add up to 1 at most.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 1).
    """
    (low, high), (low_too, high_too) = (_interval(k, n, level / 2, anytime) for k, n in (one, other))
    apart = (low > high_too) | (low_too > high)
    return np.where(np.asarray(same, dtype=bool), apart, low + low_too > 1)


def _interval(k: ArrayLike, n: ArrayLike, level: float, anytime: bool) -> tuple[Floats, Floats]:
    if not anytime:
        return lower_bound(k, n, level / 2), upper_bound(k, n, level / 2)
    missed = np.asarray(n) - np.asarray(k)
    return anytime_lower_bound(k, n, level / 2), 1 - anytime_lower_bound(missed, n, level / 2)
