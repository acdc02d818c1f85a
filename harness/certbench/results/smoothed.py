"""Whether statistical rows follow from their own counts: every radius is checked again from (k, n, alpha, sigma)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from certbench.recipe import PROTOCOLS, stride_of
from certbench.results.rules import distinct
from certbench.seeding import noise_device
from certbench.stats.smoothing import GUARD, PROOFS, two_sided_radius

_COUNTS = ("sigma", "alpha", "n", "k")
"""What every statistical row says, whoever made it: nobody can judge a certificate that names no draws."""
_OF_THE_CORE = (*_COUNTS, "n0", "draws", "stop_reason", "generator_key", "exact_noise")
_RIVAL = re.compile(r"rival (\d{1,18}) of (\d{1,9})$")


def smoothed_problems(shard: pa.Table, run: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the statistical certificates of one run by one certifier; else nothing.

    Those of a plugin's certifier need counts; those of the core's must follow from theirs as well.
    """
    certifier, guarantee = (shard.column(name)[0].as_py() for name in ("certifier", "guarantee"))
    of_the_core = certifier in PROTOCOLS and certifier != "linf"
    if guarantee == "statistical" and run["norm"] == "linf":
        yield "is statistical, which no L-inf protocol knows"
        return
    if not of_the_core and run["protocol"].startswith(("l2-fixed-", "l2-sequential-")):
        yield f"is of protocol {run['protocol']}, but {certifier!r} is none of its certifiers"
    if of_the_core and guarantee != "statistical":
        yield f"is by {certifier}, whose guarantee is statistical and not {guarantee}"
    if not of_the_core:
        if guarantee != "statistical":
            return
        shard = shard.filter(pc.is_valid(shard.column("radius")))  # what failed may lack counts
    missing = [name for name in (_OF_THE_CORE if of_the_core else _COUNTS) if shard.column(name).null_count]
    if missing:
        yield f"lacks {', '.join(missing)}, and a statistical certificate is judged by its draws"
    elif shard.num_rows:
        yield from _count_problems(shard, run)
        if of_the_core:
            yield from _core_problems(shard, run, certifier)


def _count_problems(shard: pa.Table, run: Mapping[str, Any]) -> Iterator[str]:
    names = ("index", "sigma", "alpha")
    rows = {name: shard.column(name).to_numpy() for name in names}
    stride = stride_of(run["protocol"])
    counted = pc.add(shard.column("n"), shard.column("n0").fill_null(0))
    too_many = pc.fill_null(pc.greater(counted, shard.column("draws")), False)
    undrawn = pc.fill_null(pc.and_(pc.less(shard.column("n"), 1), pc.is_valid(shard.column("radius"))), False)
    broken = {
        f"is not among every {stride}th, which its protocol names": rows["index"] % stride != 0,
        f"has another sigma than its run's {run['sigma']}": rows["sigma"] != run["sigma"],
        "has an alpha of its own": rows["alpha"] != rows["alpha"][0],
        "is decided without a draw": undrawn.to_numpy(),
        "counts more draws than were made": too_many.to_numpy(),
    }
    yield from _first_of_each(rows["index"], broken)


def _core_problems(shard: pa.Table, run: Mapping[str, Any], certifier: str) -> Iterator[str]:
    names = ("index", "sigma", "alpha", "n", "k", "radius", "proved_by")
    rows = {name: shard.column(name).to_numpy() for name in names}
    foreign = [
        key for key in distinct(shard.column("generator_key")) if noise_device(key, run["run_id"]) is None
    ]
    if foreign:
        yield f"counts draws of the noise {foreign[0][:60]!r}, which is not that of its run"
    unproved = (rows["radius"] > 0) & ~_proved(certifier, rows)
    yield from _first_of_each(rows["index"], {"has a radius that its counts do not prove": unproved})


def _first_of_each(index: np.ndarray, broken: Mapping[str, np.ndarray]) -> Iterator[str]:
    for problem, mask in broken.items():
        if mask.any():
            yield f"image {index[mask][0]} {problem}"


def _proved(certifier: str, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    alpha, sigma = float(rows["alpha"][0]), float(rows["sigma"][0])
    if certifier in PROOFS:
        return PROOFS[certifier](rows["k"], rows["n"], alpha, sigma, rows["radius"])
    proved = np.zeros(len(rows["k"]), dtype=bool)
    for row, text in enumerate(rows["proved_by"]):
        rival = _RIVAL.search(text)
        missed = int(rows["n"][row] - rows["k"][row])
        if rival and missed <= int(rival[1]) * int(rival[2]) and int(rival[1]) <= missed:
            most = two_sided_radius(
                rows["k"][row], rows["n"][row], alpha, sigma, int(rival[1]), int(rival[2])
            )
            proved[row] = rows["radius"][row] <= most + sigma * GUARD / 2
    return proved
