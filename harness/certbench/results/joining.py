"""An unpacked bundle joins a store: not before its rows are known to fit those that are there, and these their boards.

A bundle may keep every rule by itself and still spoil what it joins: rows on other images under the same names, an index
that makes everybody else's rows look unfinished, names that fall together where they become names of files. All of that
is looked for before the first file is placed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from certbench.errors import DataError, PluginError, UsageError
from certbench.plugins import Plugins, installed
from certbench.recipe import stride_of
from certbench.results.bundle import Refused, Unpacked, without
from certbench.results.store import ResultStore

Obstacles = Callable[[ResultStore], Sequence[str]]
"""What keeps the boards of a store from being built, one line each; boards are of a higher room than this one."""


@dataclass(frozen=True)
class Imported:
    """What an import brought: runs that are new, with how many certificates of each were made again, and runs that were
    there already with equal rows."""

    new: Mapping[str, int]
    known: tuple[str, ...]
    submitter: str


def join(
    unpacked: Unpacked,
    store: ResultStore,
    obstacles: Obstacles,
    recheck: Callable[[], Mapping[str, int]] = dict,
    plugins: Plugins | None = None,
) -> Imported:
    """Add the runs of a bundle to a store, each labelled with its submitter before its certificates come.

    Args:
        obstacles: asked of both stores together before anything is placed.
        recheck: run once nothing else speaks against the bundle; run ids to how many certificates were made again.
        plugins: those whose data sets are known here; by default the installed ones.

    Raises:
        Refused: with every reason that was found; nothing was placed.
        DataError: the rows that are here are damaged, or no boards can be built even of these.
        PluginError: what data sets there are cannot be told.
    """
    source = unpacked.store
    runs = {row["run_id"]: row for row in source.read("runs").to_pylist()}
    known = tuple(run_id for run_id in runs if store.has_run(run_id))
    new = {run_id: row for run_id, row in runs.items() if run_id not in known}
    reasons = [reason for run_id in known for reason in _differences(source, store, run_id)]
    reasons += _strangers(source, store, new, plugins or installed())
    if new:
        _label(unpacked, dict.fromkeys(new, 0))
        reasons += _obstacles(_Together(store, source, new), store, obstacles)
    if reasons:
        raise Refused("the bundle", [without(source, reason) for reason in reasons])
    made = recheck()
    rechecked = {run_id: made.get(run_id, 0) for run_id in new}
    _label(unpacked, rechecked)
    for table in ("runs", "submissions", "certificates", "audits", "timings"):
        for path in source.paths(table):
            if path.name[:16] in new:
                store.place(table, source.load(table, path), path.read_bytes())
    return Imported(rechecked, known, unpacked.packed.submitter)


def _label(unpacked: Unpacked, rechecked: Mapping[str, int]) -> None:
    """Say in the bundle's own store, from which all is copied, who submitted its runs."""
    for run_id, made in rechecked.items():
        unpacked.store.write_submission(
            {
                "run_id": run_id,
                "submitter": unpacked.packed.submitter,
                "bundle_digest": unpacked.packed.digest,
                "rechecked": made,
            }
        )


def _differences(source: ResultStore, store: ResultStore, run_id: str) -> Iterator[str]:
    for name in ("runs", "certificates", "audits"):
        for path in source.paths(name):
            if path.name[:16] != run_id:
                continue
            here = store.folder / name / path.name
            if not here.is_file() or not store.load(name, here).equals(source.load(name, path)):
                yield f"run {run_id} is recorded here already, and its {name} differ ({path.name})"


class _Together(ResultStore):
    """The files of a store, and after them those of a bundle's new runs; to be read, never to be written."""

    def __init__(self, store: ResultStore, source: ResultStore, new: Mapping[str, Any]) -> None:
        super().__init__(store.folder)
        self._source, self._new = source, new

    def paths(self, table: str) -> list[Path]:
        theirs = [path for path in self._source.paths(table) if path.name[:16] in self._new]
        return [*super().paths(table), *theirs]


def _obstacles(together: ResultStore, store: ResultStore, obstacles: Obstacles) -> Sequence[str]:
    found = obstacles(together)
    if found and store.paths("certificates") and (own := obstacles(store)):
        raise DataError(f"no boards can be built of the rows in {store.folder} as they are: {own[0]}")
    return found


# Rows that would not fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """What certbench or a plugin says of a data set: how many test images it has, and its digest, if one is pinned."""

    size: int
    digest: str


def _strangers(
    source: ResultStore, store: ResultStore, new: Mapping[str, Mapping[str, Any]], plugins: Plugins
) -> Iterator[str]:
    """Runs on other images than those here, or than the data sets that are known here."""
    here = {row["dataset"]: row["dataset_digest"] for row in store.read("runs").to_pylist()}
    datasets = {row["dataset"]: _dataset(row["dataset"], plugins) for row in new.values()}
    names = _dataset_names(plugins)
    for run_id, row in new.items():
        name, described = row["dataset"], datasets[row["dataset"]]
        if here.get(name, row["dataset_digest"]) != row["dataset_digest"]:
            yield f"run {run_id} was made on another version of {name} than the runs here"
        if described is not None and described.digest not in ("", row["dataset_digest"]):
            yield f"run {run_id} was made on another version of {name} than certbench reads"
        if described is None and (other := names.get(_letters(name))) is not None:
            yield f"run {run_id} was made on {name!r}, a name that is not to be told from {other!r}"
        for column in ("protocol", "method", "dataset", "model"):
            if row[column] != row[column].strip():
                yield f"run {run_id} has spaces around its {column} {row[column]!r}"
    for path in source.paths("certificates"):
        run = new.get(path.name[:16])
        if run is not None:
            yield from _outside(source.load("certificates", path), run, datasets[run["dataset"]])


def _outside(certificates: pa.Table, run: Mapping[str, Any], described: _Described | None) -> Iterator[str]:
    """Images that the data set does not have, or the run's subset of it.

    How many images a data set has is known of those that certbench or an installed plugin describes; of others, see
    :func:`certbench.leaderboard.board.boards`.
    """
    where = f"run {run['run_id']}, certifier {certificates.column('certifier')[0].as_py()}"
    index = certificates.column("index").to_numpy()
    if described is not None and index.max() >= described.size:
        yield f"{where}: image {index.max()} is none of the {described.size} test images of {run['dataset']}"
    between = index[index % stride_of(run["protocol"]) != 0]
    if len(between):
        yield f"{where}: image {between[0]} is none of the images of protocol {run['protocol']!r}"


def _dataset(name: str, plugins: Plugins) -> _Described | None:
    try:
        info = plugins.dataset(name)
    except PluginError:
        raise
    except UsageError:
        return None
    return _Described(info.test_size, info.digest)


def _dataset_names(plugins: Plugins) -> dict[str, str]:
    """Names of data sets by their letters; one for choosing settings has a name of its own."""
    known = plugins.datasets()
    names = [*known, *(info.held_out().name for info in known.values() if info.validation_per_class)]
    return {_letters(name): name for name in names}


def _letters(name: str) -> str:
    """What is left of a name where case, spaces and signs are not told apart, as in names of files."""
    return re.sub(r"[^a-z0-9]+", "", name.casefold())
