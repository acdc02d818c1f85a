"""Bundles changed by hand, every digest right again, as somebody would send them who means ill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from certbench.leaderboard.board import obstacles
from certbench.results.bundle import BUNDLE, export_runs, unpack
from certbench.results.files import _BLANK, _MARK, encode
from certbench.results.joining import Imported, join
from certbench.results.schema import AUDITS, CERTIFICATES, RUNS, TIMINGS, TableSpec
from certbench.results.store import ResultStore

Lines = list[dict[str, Any]]
Change = Callable[[Lines], Lines]


def here(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "here" / "results")


def export(tmp_path: Path, *runs: str) -> Path:
    """A bundle of runs recorded in ``there``."""
    path = tmp_path / "rows.parquet"
    export_runs(ResultStore(tmp_path / "there" / "results"), runs, path, "A Lab")
    return path


def take_in(path: Path, tmp_path: Path, number: int = 0) -> Imported:
    return join(unpack(path, tmp_path / f"unpacked{number}"), here(tmp_path), obstacles)


def rewritten(path: Path, change: Change) -> Path:
    """The bundle with its lines changed."""
    lines = change(pq.read_table(path).select(BUNDLE.schema.names).to_pylist())
    for line in lines:
        line["digest"] = hashlib.sha256(line["content"]).hexdigest()
    path.write_bytes(encode(pa.Table.from_pylist(lines, schema=BUNDLE.schema), BUNDLE))
    return path


def with_rows(table: str, change: Change) -> Change:
    """Change the rows of the first file of a table inside the bundle."""
    return with_file(table, lambda spec, rows: encode(_table(spec, change(rows.to_pylist())), spec), change)


def with_file(
    table: str, change: Callable[[TableSpec, pa.Table], bytes], count: Change | None = None
) -> Change:
    """Put other bytes in the place of the first file of a table inside the bundle."""
    spec = {spec.name: spec for spec in (CERTIFICATES, RUNS, TIMINGS, AUDITS)}[table]

    def changed(lines: Lines) -> Lines:
        at = next(place for place, line in enumerate(lines) if line["table"] == table)
        rows = pq.read_table(pa.BufferReader(lines[at]["content"])).replace_schema_metadata(None)
        number = len(count(rows.to_pylist())) if count else lines[at]["rows"]
        return [
            *lines[:at],
            lines[at] | {"content": change(spec, rows), "rows": number},
            *lines[at + 1 :],
        ]

    return changed


def _table(spec: TableSpec, rows: Lines) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=spec.schema)


def first_row(**changes: Any) -> Change:
    return lambda rows: [rows[0] | changes, *rows[1:]]


def manifest(**changes: Any) -> Change:
    def changed(lines: Lines) -> Lines:
        content = json.loads(lines[0]["content"]) | changes
        return [lines[0] | {"content": json.dumps(content).encode()}, *lines[1:]]

    return changed


def written(table: pa.Table, spec: TableSpec, **options: Any) -> bytes:
    """As ``encode`` writes a table, but for some options of the writer and whatever columns it has."""
    sink = pa.BufferOutputStream()
    usual = {"version": "2.6", "compression": "zstd", "store_schema": False}
    with pq.ParquetWriter(sink, table.schema, **(usual | options)) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "certbench.table": spec.name,
                "certbench.version": str(spec.version),
                "certbench.digest": _MARK + _BLANK,
            }
        )
    return signed(sink.getvalue().to_pybytes())


def signed(content: bytes) -> bytes:
    """The file with the digest that it should have."""
    start = content.rindex(_MARK) + len(_MARK)
    blank = content[:start] + _BLANK + content[start + len(_BLANK) :]
    return blank[:start] + hashlib.sha256(blank).hexdigest().encode() + blank[start + len(_BLANK) :]
