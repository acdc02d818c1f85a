"""The folder of rows: one Parquet file per run, per run and certifier, per attack on those, and per run and stage.

``<folder>/runs/<run>.parquet``, ``<folder>/certificates/<run>-<certifier>-<settings>.parquet``,
``<folder>/audits/<run>-<certifier>-<settings>-<attack>-<its settings>.parquet`` and
``<folder>/timings/<run>-<stage>.parquet``. Every file is replaced as a whole, and only its owner writes it: one
process works on a run at a time. Readers may come at any moment; they see each file before or after a write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from certbench.errors import DataError, RunError, nearest
from certbench.results.checks import CrossCheck
from certbench.results.files import decode, encode, write_atomically
from certbench.results.rules import FAILURES, UNDECIDED, check_table, distinct
from certbench.results.schema import AUDITS, CERTIFICATES, RUNS, SUBMISSIONS, TIMINGS, TableSpec, table_spec

Merge = Callable[[pa.Table, pa.Table, str], pa.Table]


def certify_stage(certifier: str, settings_digest: str) -> str:
    """The name under which the time of one certifier is kept, since a run may be certified by several."""
    return f"certify-{certifier}-{settings_digest[:8]}"


def audit_stage(certifier: str, settings_digest: str, attack: str, attack_settings_digest: str) -> str:
    """The name under which the time of one attack on one certifier's certificates is kept."""
    return f"audit-{certifier}-{settings_digest[:8]}-{attack}-{attack_settings_digest[:8]}"


class ResultStore:
    """Rows kept in ``folder``, which is made when the first row is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    # Writing -------------------------------------------------------------------------------------------------------

    def write_run(self, row: Mapping[str, Any]) -> Path:
        """Record a trained network; fractions are written out, nullable columns may be left out.

        A row may be corrected (a published figure, say) while it names the same checkpoint.

        Raises:
            DataError: a column is missing, unknown or wrong, or certificates exist for another checkpoint of the run.
            RunError: the folder cannot be written.
        """
        values = {name: str(value) if isinstance(value, Fraction) else value for name, value in row.items()}
        return self._put(
            RUNS, _as_table(RUNS, {name: [value] for name, value in values.items()}), self._replace_run
        )

    def write_certificates(
        self,
        run_id: str,
        certifier: str,
        settings_digest: str,
        columns: Mapping[str, Any] | pa.Table,
    ) -> Path:
        """Record certificates of one run by one certifier; the run's row must be there.

        ``columns`` maps column names to arrays with one entry per image, or to one value for all of them; nullable
        columns may be left out. As in :class:`certbench.contract.Certificates`, NaN stands for an unknown radius or
        margin, and a negative prediction for none: both become null. Rows join those already there: images may be
        added, and a failure (error, timeout, not_run) may be replaced; a decided image never changes.

        Raises:
            DataError: a column or row is wrong, or a recorded decision would change.
            RunError: the run is not recorded, or the folder cannot be written.
        """
        if isinstance(columns, pa.Table):
            columns = {name: columns.column(name) for name in columns.column_names}
        if not self.has_run(run_id):
            raise RunError(
                f"run {run_id!r} has no row in {self.folder}; write_run comes before write_certificates"
            )
        own = {"run_id": run_id, "certifier": certifier, "settings_digest": settings_digest}
        table = _as_table(CERTIFICATES, _spread({**columns, **own}))
        check_table(table, CERTIFICATES.name, f"new rows for {CERTIFICATES.name}")
        problems = CrossCheck({run_id: self.run(run_id)}).problems(table) if table.num_rows else []
        if problems:  # one bad set of rows would keep every board of the folder from being built
            raise DataError(f"certificates contradict their recipe and are not recorded: {problems[0]}")
        return self._put(CERTIFICATES, table, _join_certificates)

    def write_audits(
        self,
        run_id: str,
        certifier: str,
        settings_digest: str,
        attack: str,
        attack_settings_digest: str,
        columns: Mapping[str, Any],
    ) -> Path:
        """Record what one attack found; the certificates it attacked must be there and stay as they are.

        ``columns`` maps column names to arrays with one entry per ball; NaN stands for an unknown distance. Rows join
        those already there: balls may be added, and an undecided one (error, not_attacked) may be replaced; what was
        found, or withstood, never changes.

        Raises:
            DataError: a column or row is wrong, or a recorded outcome would change.
            RunError: the certificates are not recorded, or the folder cannot be written.
        """
        if not self.has_certificates(run_id, certifier, settings_digest):
            raise RunError(
                f"run {run_id!r} has no certificates by {certifier!r} in {self.folder}; "
                "write_certificates comes before write_audits"
            )
        own = {"run_id": run_id, "certifier": certifier, "settings_digest": settings_digest}
        by = {"attack": attack, "attack_settings_digest": attack_settings_digest}
        return self._put(AUDITS, _as_table(AUDITS, _spread({**columns, **own, **by})), _join_audits)

    def write_timing(self, row: Mapping[str, Any]) -> Path:
        """Add what one session of a stage has cost; ``shard`` is 0 unless given. See :data:`schema.TIMINGS`.

        Raises:
            DataError: a column is missing, unknown or wrong, or the session is already recorded differently.
            RunError: the folder cannot be written.
        """
        values = {"shard": 0, **row}
        return self._put(
            TIMINGS, _as_table(TIMINGS, {name: [value] for name, value in values.items()}), _append
        )

    def write_submission(self, row: Mapping[str, Any]) -> Path:
        """Label an imported run with who submitted it and how many of its certificates were made again and agreed.

        Raises:
            DataError: a column is missing, unknown or wrong, or the run is labelled with another submitter.
            RunError: the folder cannot be written.
        """
        columns = {name: [value] for name, value in row.items()}
        return self._put(SUBMISSIONS, _as_table(SUBMISSIONS, columns), _relabel)

    def place(self, table: str, rows: pa.Table, content: bytes) -> Path:
        """Keep a whole file as it came, under the name that its rows give it; ``rows`` are what it holds.

        Raises:
            DataError: a file of that name is there with other bytes, or its rows have several owners.
            RunError: the folder cannot be written.
        """
        path = self._path(table_spec(table), rows)
        if path.exists() and path.read_bytes() != content:
            raise DataError(f"{path.name}: two files of one name")
        write_atomically(path, content)
        return path

    def _put(self, spec: TableSpec, table: pa.Table, merge: Merge) -> Path:
        if table.num_rows == 0:
            raise DataError(f"no rows were given for {spec.name}")
        # Checked before its file is named: a name is only built from values that the rules let through.
        check_table(table, spec.name, f"new rows for {spec.name}")
        path = self._path(spec, table)
        if path.exists():
            table = merge(self._load(spec, path), table, str(path))
        table = table.sort_by([(name, "ascending") for name in spec.key]).combine_chunks()
        check_table(table, spec.name, str(path))
        self._path(spec, table)  # still the rows of one owner
        content = encode(table, spec)
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
        return path

    def _replace_run(self, old: pa.Table, new: pa.Table, where: str) -> pa.Table:
        digests = [table.column("checkpoint_digest")[0].as_py() for table in (old, new)]
        run_id = new.column("run_id")[0].as_py()
        taught = [table.column("teacher_digest")[0].as_py() for table in (old, new)]
        if taught[0] not in (None, taught[1]) and digests[0] == digests[1]:
            raise DataError(
                f"{where}: run {run_id} learnt from network {taught[0][:16]}, not from {taught[1]!r:.18}"
            )
        if digests[0] != digests[1] and any((self.folder / CERTIFICATES.name).glob(f"{run_id}-*.parquet")):
            raise DataError(
                f"{where}: run {run_id} has certificates of checkpoint {digests[0][:16]}; they do not hold for "
                f"{digests[1][:16]}. Record the new network in another folder, or remove the run's files first"
            )
        return new

    # Reading -------------------------------------------------------------------------------------------------------

    def has_run(self, run_id: str) -> bool:
        return self._named(RUNS, run_id).is_file()

    def submitter(self, run_id: str) -> str | None:
        """Who submitted a run that was imported; None where this harness made it."""
        path = self._named(SUBMISSIONS, run_id)
        if not path.is_file():
            return None
        name: str = self._load(SUBMISSIONS, path).column("submitter")[0].as_py()
        return name

    def has_certificates(self, run_id: str, certifier: str, settings_digest: str) -> bool:
        return self._named(CERTIFICATES, run_id, certifier, settings_digest).is_file()

    def certificate_sets(self, run_id: str) -> list[tuple[str, str, str]]:
        """(run id, certifier, settings digest) of every set of certificates of a run, in a fixed order."""
        found = []
        for path in sorted((self.folder / CERTIFICATES.name).glob(f"{_safe(run_id)}-*.parquet")):
            row = self._load(CERTIFICATES, path).slice(0, 1).to_pylist()[0]
            found.append((row["run_id"], row["certifier"], row["settings_digest"]))
        return found

    def has_audits(
        self, run_id: str, certifier: str, settings_digest: str, attack: str, attack_settings_digest: str
    ) -> bool:
        names = (run_id, certifier, settings_digest, attack, attack_settings_digest)
        return self._named(AUDITS, *names).is_file()

    def has_timing(self, run_id: str, stage: str) -> bool:
        return self._named(TIMINGS, run_id, stage).is_file()

    def run(self, run_id: str) -> dict[str, Any]:
        """The row of one run.

        Raises:
            DataError: there is none, or it is damaged.
        """
        row: dict[str, Any] = self._load(RUNS, self._named(RUNS, run_id)).to_pylist()[0]
        return row

    def certificates(self, run_id: str, certifier: str, settings_digest: str) -> pa.Table:
        """The certificates of one run by one certifier, sorted by index; an empty table where there are none.

        Raises:
            DataError: the file is damaged.
        """
        path = self._named(CERTIFICATES, run_id, certifier, settings_digest)
        return self._load(CERTIFICATES, path) if path.exists() else CERTIFICATES.schema.empty_table()

    def audits(self, run_id: str, certifier: str, settings_digest: str) -> pa.Table:
        """What all attacks on one certifier's certificates found; an empty table where there were none.

        Raises:
            DataError: a file is damaged.
        """
        start = self._named(AUDITS, run_id, certifier, settings_digest, "", "").stem
        paths = [path for path in self.paths(AUDITS.name) if path.name.startswith(start[:-1])]
        return self.audits_in(paths, certifier, settings_digest)

    def audits_in(self, paths: Iterable[Path], certifier: str, settings_digest: str) -> pa.Table:
        """The audits of one certifier's certificates in some files; another's name may begin alike in a file's name.

        Raises:
            DataError: a file is damaged.
        """
        rows = pa.concat_tables([AUDITS.schema.empty_table(), *(self._load(AUDITS, path) for path in paths)])
        mine = pc.and_(
            pc.equal(rows.column("certifier"), certifier),
            pc.equal(rows.column("settings_digest"), settings_digest),
        )
        return rows.filter(mine).combine_chunks()

    def paths(self, table: str) -> list[Path]:
        """The files of a table, in a fixed order."""
        folder = self.folder / table_spec(table).name
        return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))

    def load(self, table: str, path: Path) -> pa.Table:
        """One file of a table.

        Raises:
            DataError: unreadable, damaged, or breaking a rule; names the file.
        """
        return self._load(table_spec(table), path)

    def shards(self, table: str) -> Iterator[pa.Table]:
        """The files of a table one after the other, each checked as :meth:`load` does."""
        return (self.load(table, path) for path in self.paths(table))

    def read(self, table: str) -> pa.Table:
        """All rows of a table, sorted; empty, with its columns, where there are none.

        Raises:
            UsageError: no such table.
            DataError: any of its files is damaged or breaks a rule; names the file.
        """
        spec = table_spec(table)
        tables = [spec.schema.empty_table(), *self.shards(table)]
        return pa.concat_tables(tables).sort_by([(name, "ascending") for name in spec.key]).combine_chunks()

    def fetch(self, table: str, path: Path) -> pa.Table:
        """One file of a table with its bytes checked and its rows not yet: what :meth:`accept` goes on with.

        Almost all of it runs outside the interpreter's lock, so that a thread can do it ahead.

        Raises:
            DataError: unreadable or damaged; names the file.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        return decode(content, table_spec(table), str(path))

    def accept(self, table: str, path: Path, rows: pa.Table) -> pa.Table:
        """The rows that were fetched from a file, once they keep every rule.

        Raises:
            DataError: no row, a row that breaks a rule, or a file of another name than its rows; names the file.
        """
        spec = table_spec(table)
        if rows.num_rows == 0:
            raise DataError(f"{path}: holds no row")
        check_table(rows, spec.name, str(path))
        if self._path(spec, rows).name != path.name:
            raise DataError(f"{path}: is not the name of the rows inside, {self._path(spec, rows).name}")
        return rows

    def _load(self, spec: TableSpec, path: Path) -> pa.Table:
        return self.accept(spec.name, path, self.fetch(spec.name, path))

    # Names ---------------------------------------------------------------------------------------------------------

    def _path(self, spec: TableSpec, table: pa.Table) -> Path:
        """The file the rows belong in.

        Raises:
            DataError: they belong in several.
        """
        values = [distinct(table.column(name)) for name in spec.shard]
        if any(len(found) != 1 for found in values):
            raise DataError(
                f"{self.folder / spec.name}: rows of several {' / '.join(spec.shard)} in one file"
            )
        return self._named(spec, *(found[0] for found in values))

    def _named(self, spec: TableSpec, *values: str) -> Path:
        parts = [
            value[:8] if column.endswith("settings_digest") else _safe(value)
            for column, value in zip(spec.shard, values, strict=True)
        ]
        return self.folder / spec.name / f"{'-'.join(parts)}.parquet"


def _safe(text: str) -> str:
    """Part of a file name. Names that become equal here share a file, which :meth:`ResultStore._path` refuses."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:80]


def _spread(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of equal length: single values repeated, arrays as lists, unknown numbers as nulls."""
    lists = {name: _as_list(value) for name, value in columns.items() if _is_array(value)}
    lengths = {len(values) for values in lists.values()}
    if len(lengths) != 1:
        raise DataError(
            f"columns of different lengths: {', '.join(f'{k} {len(v)}' for k, v in lists.items())}"
        )
    (rows,) = lengths
    for name in ("radius", "margin", "distance"):
        if name in lists:
            lists[name] = [None if _is_nan(value) else value for value in lists[name]]
    if "prediction" in lists:
        lists["prediction"] = [None if value is None or value < 0 else value for value in lists["prediction"]]
    return {name: lists[name] if name in lists else [value] * rows for name, value in columns.items()}


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray | pa.Array | pa.ChunkedArray | list | tuple)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return list(value.to_pylist()) if isinstance(value, pa.Array | pa.ChunkedArray) else list(value)


def _as_table(spec: TableSpec, columns: Mapping[str, Any]) -> pa.Table:
    """The columns in the table's own types, the ones left out null."""
    for name in columns:
        if name not in spec.schema.names:
            raise DataError(f"{spec.name} has no column {name!r}; {nearest(name, spec.schema.names)}")
    rows = len(next(iter(columns.values()), []))
    arrays = []
    for field in spec.schema:
        if field.name not in columns and not field.nullable:
            raise DataError(f"new rows for {spec.name} lack the column {field.name!r}")
        values = columns.get(field.name, [None] * rows)
        try:
            arrays.append(_as_array(values, field.type))
        except (pa.ArrowException, OverflowError, TypeError) as error:
            line = str(error).splitlines()[0]
            raise DataError(f"new rows for {spec.name}, column {field.name!r}: {line}") from None
    return pa.Table.from_arrays(arrays, schema=spec.schema)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    """The values without loss: given a type at once, pyarrow would cut 2.5 down to 2 and not say so."""
    found = pa.array(values)
    numbers = [pa.types.is_integer(each) or pa.types.is_floating(each) for each in (found.type, kind)]
    if not (pa.types.is_null(found.type) or found.type.equals(kind) or all(numbers)):
        raise TypeError(f"holds {found.type}, not {kind}")
    return found.cast(kind)


def _join_audits(old: pa.Table, new: pa.Table, where: str) -> pa.Table:
    before = {(row["index"], row["kind"]): row for row in old.to_pylist()}
    after = {(row["index"], row["kind"]): row for row in new.to_pylist()}
    for key in before.keys() & after.keys():
        if before[key]["outcome"] not in UNDECIDED and before[key] != after[key]:
            raise DataError(
                f"{where}: image {key[0]} {before[key]['outcome']} before and {after[key]['outcome']} now under one "
                "attack; audits are never rewritten, so remove the file to start again"
            )
    return pa.Table.from_pylist(list((before | after).values()), schema=AUDITS.schema)


def _join_certificates(old: pa.Table, new: pa.Table, where: str) -> pa.Table:
    by_index = [("index", "ascending")]
    again = old.filter(pc.is_in(old.column("index"), new.column("index").combine_chunks()))
    decided = again.filter(pc.invert(pc.is_in(again.column("verdict"), pa.array(FAILURES)))).sort_by(by_index)
    same = new.filter(pc.is_in(new.column("index"), decided.column("index").combine_chunks())).sort_by(
        by_index
    )
    if decided.to_pylist() != same.to_pylist():
        raise DataError(
            f"{where}: certificates of decided images are never rewritten; remove the file to start again"
        )
    kept = old.filter(pc.invert(pc.is_in(old.column("index"), new.column("index").combine_chunks())))
    return pa.concat_tables([kept, new])


def _append(old: pa.Table, new: pa.Table, where: str) -> pa.Table:
    (row,) = new.to_pylist()
    return old if row in old.to_pylist() else pa.concat_tables([old, new])


def _relabel(old: pa.Table, new: pa.Table, where: str) -> pa.Table:
    (before,), (after,) = old.to_pylist(), new.to_pylist()
    if before["submitter"] != after["submitter"]:
        raise DataError(f"{where}: run {before['run_id']} was submitted by {before['submitter']!r} already")
    return new if after["rechecked"] >= before["rechecked"] else old
