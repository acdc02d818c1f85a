"""Whether statistical rows follow from their own counts: every radius is checked again from (k, n, alpha, sigma)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from certbench.recipe import PROTOCOLS
from certbench.stats.smoothing import GUARD, PROOFS, two_sided_radius

_COUNTS = ("sigma", "alpha", "n0", "n", "k", "draws", "stop_reason", "generator_key", "exact_noise")
_RIVAL = re.compile(r"rival (\d{1,18}) of (\d{1,9})$")


def smoothed_problems(shard: pa.Table, run: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the certificates of one run by one of the core's smoothed certifiers; else nothing."""
    certifier, guarantee = (shard.column(name)[0].as_py() for name in ("certifier", "guarantee"))
    if guarantee == "statistical" and run["norm"] == "linf":
        yield "is statistical, which no L-inf protocol knows"
    if certifier not in PROTOCOLS or certifier == "linf":
        if run["protocol"].startswith(("l2-fixed-", "l2-sequential-")):
            yield f"is of protocol {run['protocol']}, but {certifier!r} is none of its certifiers"
        return
    if guarantee != "statistical":
        yield f"is by {certifier}, whose guarantee is statistical and not {guarantee}"
    missing = [name for name in _COUNTS if shard.column(name).null_count]
    if missing:
        yield f"lacks {', '.join(missing)}"
        return
    names = ("index", "sigma", "alpha", "n0", "n", "k", "draws", "radius", "proved_by")
    rows = {name: shard.column(name).to_numpy() for name in names}
    broken = {
        f"has another sigma than its run's {run['sigma']}": rows["sigma"] != run["sigma"],
        "has an alpha of its own": rows["alpha"] != rows["alpha"][0],
        "counts more draws than were made": rows["n"] + rows["n0"] > rows["draws"],
        "has a radius that its counts do not prove": (rows["radius"] > 0) & ~_proved(certifier, rows),
    }
    for problem, mask in broken.items():
        if mask.any():
            yield f"image {rows['index'][mask][0]} {problem}"


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
