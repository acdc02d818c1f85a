"""Comparing classifiers on the same images: McNemar's exact test, and Holm's correction for many of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def only_first(hits: NDArray[np.bool_]) -> Counts:
    """Entry (i, j): the images that row i has and row j has not; ``hits`` has one row per classifier, one column per
    image. The product is of whole numbers below 2^24, so it is exact in any order of summation."""
    if hits.shape[1] >= 2**24:
        raise ValueError("more images than single precision counts exactly")
    ones = hits.astype(np.float32)
    shared = (ones @ ones.T).astype(np.int64)
    return np.diag(shared)[:, None] - shared


def mcnemar(only_one: ArrayLike, only_other: ArrayLike) -> Floats:
    """Two-sided p-values of McNemar's exact test, from the numbers of images that only one of two classifiers has.

    Where both are equally good, each of these images falls to either with probability 1/2; the p-value is twice the
    smaller tail of that binomial distribution, and at most 1.
    """
    one, other = np.broadcast_arrays(np.asarray(only_one, np.int64), np.asarray(only_other, np.int64))
    if np.any(one < 0) or np.any(other < 0):
        raise ValueError("counts of images are not negative")
    fewer, all_of_them = np.minimum(one, other), one + other
    tail = special.bdtr(fewer.astype(np.float64), all_of_them, 0.5)
    return np.where(one == other, 1.0, np.minimum(2 * tail, 1.0))


def holm(p: ArrayLike) -> Floats:
    """p-values adjusted so that rejecting those at most alpha errs anywhere with probability at most alpha (Holm 1979).

    ``p`` is one-dimensional; whatever the dependence of the tests.
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return adjusted
