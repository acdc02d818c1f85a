"""Files that are either whole or absent, and Parquet whose every byte is covered by a digest."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from certbench.errors import DataError, RunError
from certbench.results.migrations import migrated
from certbench.results.schema import TableSpec

_MARK = b"certbench-file-sha256:"
_BLANK = b"0" * 64
_ROW_GROUP = 65_536


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a reader, or a crash, meets the old file or the new one, never a part.

    Raises:
        RunError: the folder cannot be made or written; names the path.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; systems that cannot open a folder do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def encode(table: pa.Table, spec: TableSpec) -> bytes:
    """The table as Parquet: equal rows give equal bytes under one version of pyarrow.

    The footer carries table name, version, and the SHA-256 of the whole file with that digest blanked out, so that
    no byte, of data or of metadata, can change unnoticed. Columns of bytes are written value by value: with a dictionary,
    a reader could not tell what the file unfolds to.
    """
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        spec.schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        store_schema=False,
        use_dictionary=_with_dictionary(spec),
    )
    with writer:
        writer.write_table(table, row_group_size=_ROW_GROUP)
        writer.add_key_value_metadata(
            {
                "certbench.table": spec.name,
                "certbench.version": str(spec.version),
                "certbench.digest": _MARK + _BLANK,
            }
        )
    content = bytes(sink.getvalue().to_pybytes())
    start = content.rindex(_MARK) + len(_MARK)
    return content[:start] + hashlib.sha256(content).hexdigest().encode() + content[start + len(_BLANK) :]


def _with_dictionary(spec: TableSpec) -> list[str]:
    if any(pa.types.is_binary(field.type) for field in spec.schema):
        return []
    return [name for name in spec.schema.names if name not in spec.plain]


def decode(content: bytes, spec: TableSpec, where: str) -> pa.Table:
    """The table in the bytes of a file; ``where`` names the file in messages. Rules on rows are checked elsewhere.

    Raises:
        DataError: truncated, changed by as much as one byte, not written by certbench, or of another version.
    """
    try:
        file, version = opened(content, spec, where)
        # An explicit empty schema metadata: what a reader sees is columns, not bookkeeping.
        return migrated(file.read(use_threads=False).replace_schema_metadata(None), spec, version)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: is not readable Parquet: {str(error).splitlines()[0]}") from None


def opened(content: bytes, spec: TableSpec, where: str) -> tuple[pq.ParquetFile, int]:
    """The bytes of a file once their digest is right, its rows not yet read, and the version of its table.

    Raises:
        DataError: as :func:`decode`.
    """
    _check_digest(content, where)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: is not readable Parquet: {str(error).splitlines()[0]}") from None
    footer = file.metadata.metadata or {}
    name, version = footer.get(b"certbench.table"), footer.get(b"certbench.version")
    if name != spec.name.encode():
        raise DataError(f"{where}: holds the table {_shown(name)}, not {spec.name!r}")
    known = {str(number).encode(): number for number in range(1, spec.version + 1)}
    if version not in known:
        raise DataError(
            f"{where}: is version {_shown(version)} of the table {spec.name!r}; "
            f"this certbench reads version {spec.version}"
        )
    return file, known[version]


def _check_digest(content: bytes, where: str) -> None:
    start = content.rfind(_MARK)
    if start < 0:
        raise DataError(
            f"{where}: is truncated, or was not written by certbench; restore it or record it again"
        )
    start += len(_MARK)
    end = start + len(_BLANK)
    digest = hashlib.sha256(memoryview(content)[:start])
    digest.update(_BLANK + content[end:])
    if digest.hexdigest().encode() != content[start:end]:
        raise DataError(
            f"{where}: was damaged or changed after it was written (its digest does not match); "
            "restore it or record it again"
        )


def _shown(value: bytes | None) -> str:
    return repr(value.decode(errors="replace")) if value is not None else "without a name"
