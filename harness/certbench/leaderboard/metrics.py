"""What the rows of one run by one certifier add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from certbench.errors import DataError
from certbench.results.rules import VERDICTS


@dataclass(frozen=True)
class Metrics:
    """Counts over the images of one run, decided by one certifier.

    ``images`` counts rows, and accuracies are shares of it: an image that failed counts as neither correct (unless
    its prediction is known) nor certified. ``acr`` is the mean radius over all images, a misclassified one counting
    as 0, and None where any radius is unknown. ``reach`` is the largest index plus one.
    """

    run_id: str
    certifier: str
    settings_digest: str
    guarantee: str
    deploy: str
    images: int
    reach: int
    correct: int
    verdicts: Mapping[str, int]
    acr: float | None

    @property
    def certified(self) -> int:
        return self.verdicts["certified"]

    @property
    def decided(self) -> int:
        """Images that the certifier was run on."""
        return self.images - self.verdicts["not_run"]

    @property
    def clean_accuracy(self) -> Fraction:
        """In percent, exactly."""
        return Fraction(100 * self.correct, self.images)

    @property
    def certified_accuracy(self) -> Fraction:
        """In percent, exactly."""
        return Fraction(100 * self.certified, self.images)


def measure(shard: pa.Table) -> Metrics:
    """Add up the certificates of one run by one certifier.

    Raises:
        DataError: more images are certified than correct; names the run.
    """
    first = shard.slice(0, 1).to_pylist()[0]
    counted = {
        entry["values"]: entry["counts"] for entry in pc.value_counts(shard.column("verdict")).to_pylist()
    }
    radius = shard.column("radius")
    correct = pc.equal(shard.column("prediction"), shard.column("label"))
    if (
        first["guarantee"] == "statistical"
    ):  # a smoothed classifier is right where it is certified at some radius
        correct = pc.and_(correct, pc.greater(radius, 0.0))
    metrics = Metrics(
        run_id=first["run_id"],
        certifier=first["certifier"],
        settings_digest=first["settings_digest"],
        guarantee=first["guarantee"],
        deploy=first["deploy"],
        images=shard.num_rows,
        reach=int(pc.max(shard.column("index")).as_py()) + 1,
        correct=int(pc.sum(correct).as_py() or 0),
        verdicts={verdict: counted.get(verdict, 0) for verdict in VERDICTS},
        acr=None if radius.null_count else math.fsum(radius.to_pylist()) / shard.num_rows,
    )
    check_order(metrics)
    return metrics


def check_order(metrics: Metrics) -> None:
    """Certified accuracy cannot exceed clean accuracy; a table that says so is not built."""
    if metrics.certified > metrics.correct:
        raise DataError(
            f"run {metrics.run_id}, certifier {metrics.certifier}: {metrics.certified} images are certified but only "
            f"{metrics.correct} are classified correctly; its rows are wrong and no table is built"
        )


@dataclass(frozen=True)
class Cost:
    """Seconds of one stage of one run, summed over its sessions, and the devices they ran on."""

    seconds: float
    devices: tuple[str, ...]


def costs(timings: pa.Table) -> dict[tuple[str, str], Cost]:
    """The cost of every (run id, stage)."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in timings.to_pylist():
        rows.setdefault((row["run_id"], row["stage"]), []).append(row)
    return {
        key: Cost(math.fsum(row["seconds"] for row in group), tuple(sorted({row["device"] for row in group})))
        for key, group in rows.items()
    }
