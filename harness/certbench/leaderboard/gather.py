"""The rows of a store as entries: one run by one certifier, added up while its file is read.

Files are read a few at a time, so that memory does not grow with their number beyond what every image leaves behind: a
verdict and a radius.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from certbench.errors import DataError, UsageError
from certbench.leaderboard.metrics import (
    AuditCounts,
    Cost,
    Metrics,
    attacked_accuracy,
    costs,
    count_audits,
    measure,
)
from certbench.results.checks import CrossCheck, audit_problems
from certbench.results.schema import table_spec
from certbench.results.store import ResultStore, certify_stage

_AHEAD = 4
"""Files that a second thread reads and decodes, outside the interpreter's lock, while the rows of others are added up."""

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Entry:
    """One run by one certifier: its row, what its certificates and their audits add up to, its cost, its submitter."""

    run: Mapping[str, Any]
    metrics: Metrics
    train: Cost | None
    certify: Cost | None
    audit: AuditCounts | None
    attacked: Fraction | None
    submission: Mapping[str, Any] | None = None


def gather(store: ResultStore) -> tuple[list[Entry], list[str]]:
    """Every run of a store by every certifier, in the order of their files, submitted ones last; and, one line each, where
    rows contradict others before them, whose entries are left out. So a submission is never what ours are held against.

    Raises:
        UsageError: the store holds no certificates.
        DataError: a file is damaged.
    """
    # Listed in this order, since a run is always written before its certificates, and they before their audits.
    audits = store.paths("audits")
    certificates = store.paths("certificates")
    if not certificates:
        raise UsageError(
            f"no certificates in {store.folder}; record some first, for instance with `certbench run`"
        )
    runs, submissions = (
        {row["run_id"]: row for row in _read(store, table).to_pylist()} for table in ("runs", "submissions")
    )
    certificates.sort(key=lambda path: path.name.partition("-")[0] in submissions)
    cost = costs(_read(store, "timings"))
    check = CrossCheck(runs)

    attached = _attached(audits)
    entries: list[Entry] = []
    problems: list[str] = []
    fetched = _ahead(lambda path: store.fetch("certificates", path), certificates)
    for path, rows in zip(certificates, fetched, strict=True):
        shard = store.accept("certificates", path, rows)
        contradictions = [f"{path}: {problem}" for problem in check.problems(shard)]
        problems += contradictions
        if contradictions:
            continue
        try:
            metrics = measure(shard)
            audit = _audit(store, attached(path), runs[metrics.run_id], metrics, shard)
            attacked = attacked_accuracy(metrics, audit)
        except DataError as error:
            problems.append(str(error))
            continue
        run_id, stage = metrics.run_id, certify_stage(metrics.certifier, metrics.settings_digest)
        entries.append(
            Entry(
                runs[run_id],
                metrics,
                cost.get((run_id, "train")),
                cost.get((run_id, stage)),
                audit,
                attacked,
                submissions.get(run_id),
            )
        )
    return entries, problems


def _read(store: ResultStore, table: str) -> pa.Table:
    """A table of small files."""
    shards = [store.load(table, path) for path in store.paths(table)]
    return pa.concat_tables([table_spec(table).schema.empty_table(), *shards])


def _attached(audits: Sequence[Path]) -> Callable[[Path], list[Path]]:
    """What finds the audits that may be of a file of certificates, told by their names."""
    by_run: dict[str, list[Path]] = {}
    for path in audits:
        by_run.setdefault(path.name.partition("-")[0], []).append(path)

    def attached(certificates: Path) -> list[Path]:
        candidates = by_run.get(certificates.name.partition("-")[0], [])
        return [path for path in candidates if path.name.startswith(f"{certificates.stem}-")]

    return attached


def _audit(
    store: ResultStore,
    paths: Sequence[Path],
    run: Mapping[str, Any],
    metrics: Metrics,
    certificates: pa.Table,
) -> AuditCounts | None:
    audits = store.audits_in(paths, metrics.certifier, metrics.settings_digest)
    if not audits.num_rows:
        return None
    problems = audit_problems(audits, certificates, run)
    if problems:
        raise DataError(f"{store.folder / 'audits'}: {problems[0]}")
    return count_audits(certificates, audits)


def _ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` in order, on a thread of its own, a few items ahead of what is asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
