"""Parquet files from elsewhere, measured before they are read: what they would unfold to, in rows and in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from certbench.errors import DataError
from certbench.results.pages import MAX_FOOTER, MAX_GROUPS, groups_of, page_bytes
from certbench.results.rules import schema_difference
from certbench.results.schema import TableSpec

MAX_TEXT = 300
MAX_RECIPE = 65_536


@dataclass(frozen=True)
class Bounds:
    """The most that one file may unfold to. ``bytes``: its pages, and again its columns as they lie in memory."""

    rows: int
    bytes: int
    dictionaries: bool = True
    """Whether values may be named by their places in a dictionary."""


def measure(content: bytes, spec: TableSpec, bounds: Bounds) -> int:
    """The bytes that a file's columns take in memory, found without laying them out.

    First the footer alone is read, and compared with what such a file has; then the headers of the pages; then of each
    column of text every distinct value once, since a few bytes can ask for a long text a million times.

    Raises:
        DataError: not readable, other columns than the table has (or had in an older version), or beyond a bound.
    """
    groups = groups_of(content)
    rows = sum(group.rows for group in groups)
    if not groups or not all(group.rows for group in groups):
        raise DataError("holds no row")
    if rows > bounds.rows:
        raise DataError(f"unfolds to {rows} rows, more than the {bounds.rows} of a {spec.name} file")
    try:
        schema = pq.ParquetFile(
            pa.BufferReader(content),
            thrift_string_size_limit=MAX_FOOTER,
            thrift_container_size_limit=10 * MAX_GROUPS,
        ).schema_arrow
        _check_columns(schema, spec)
        if any(len(group.columns) != len(schema) for group in groups):
            raise DataError("has a group of rows without all columns")
        pages = page_bytes(content, groups, bounds.bytes, bounds.dictionaries)
        columns = _texts(content, schema) + rows * _width(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"is not readable Parquet: {(str(error).splitlines() or [''])[0]}") from None
    if columns > bounds.bytes:
        raise DataError(f"unfolds to {columns} bytes, more than the {bounds.bytes} of a {spec.name} file")
    return max(pages, columns)


def _check_columns(found: pa.Schema, spec: TableSpec) -> None:
    """Exactly the table's columns; older versions of a table lack some, which the rules look at once it is up to date."""
    wanted = spec.schema
    if spec.version > 1:
        wanted = pa.schema([field for field in wanted if field.name in found.names])
    if not found.equals(wanted):
        raise DataError(schema_difference(found, wanted))


def _texts(content: bytes, schema: pa.Schema) -> int:
    """The bytes of all columns of text once every row has its own; texts are whole UTF-8 and none is too long."""
    names = [field.name for field in schema if pa.types.is_string(field.type)]
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=names)
    total = 0
    for name in names:
        for chunk in file.read(columns=[name], use_threads=False).column(0).chunks:
            chunk.validate(full=True)
            chunk.dictionary.validate(full=True)
            lengths = pc.binary_length(chunk.dictionary)
            longest = pc.max(lengths).as_py() or 0
            if longest > (MAX_RECIPE if name == "recipe" else MAX_TEXT):
                raise DataError(f"has a text of {longest} bytes in {name!r}")
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def _width(schema: pa.Schema) -> int:
    """Bytes of one row besides the text itself: numbers, and where each text begins."""
    return sum(
        4
        if pa.types.is_string(field.type) or pa.types.is_binary(field.type)
        else -(-field.type.bit_width // 8)
        for field in schema
    )
