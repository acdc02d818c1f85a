"""Bundles that would unfold to more than anybody's memory are refused while they are still small."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundles import Change, export, rewritten, signed, with_file, written
from stores import identified

from certbench.errors import DataError, UsageError
from certbench.results import bundle
from certbench.results.bundle import BUNDLE, Refused, unpack
from certbench.results.files import _MARK, decode, encode
from certbench.results.schema import CERTIFICATES, TableSpec
from certbench.results.unfolding import Bounds, measure

MB = 2**20


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return export(tmp_path, identified(tmp_path / "there"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but footers and headers of pages may be read."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pages are decompressed")

    for name in ("read", "read_row_group", "read_row_groups", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, fail)


def a_bundle(*contents: bytes, columns: pa.Table | None = None, **options: Any) -> bytes:
    """A bundle's table of these contents, written with other options than certbench's."""
    count = len(contents)
    rows = pa.table(
        {"table": ["runs"] * count, "rows": [1] * count, "digest": ["0"] * count, "content": list(contents)},
        schema=BUNDLE.schema,
    )
    for name in columns.column_names if columns is not None else ():
        rows = rows.append_column(name, columns.column(name))
    return written(rows, BUNDLE, **options)


def refused(content: bytes, tmp_path: Path) -> str:
    path = tmp_path / "hostile.parquet"
    path.write_bytes(content)
    with pytest.raises(Refused) as caught:
        unpack(path, tmp_path / "unpacked")
    return " ".join(caught.value.reasons)


# The bundle's own table -----------------------------------------------------------------------------------------------


def test_content_that_a_dictionary_repeats_is_refused(tmp_path: Path, unread: None) -> None:
    """A few bytes ask for a megabyte five hundred times."""
    content = a_bundle(*[bytes(MB)] * 500, use_dictionary=["content"], dictionary_pagesize_limit=16 * MB)
    assert len(content) < 30_000
    assert "has a dictionary of values where none may be" in refused(content, tmp_path)


def test_content_that_compression_repeats_is_refused(tmp_path: Path, unread: None) -> None:
    content = a_bundle(bytes(64 * MB), use_dictionary=False)
    assert len(content) < 20_000
    assert f"unfolds to more than {MB + 100 * len(content)} bytes" in refused(content, tmp_path)


def test_a_large_bundle_has_a_bound_too(
    tmp_path: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", MB)
    assert f"unfolds to more than {MB} bytes" in refused(
        a_bundle(bytes(2 * MB), use_dictionary=False), tmp_path
    )


def test_what_the_footer_says_of_sizes_is_not_believed(tmp_path: Path, unread: None) -> None:
    content = a_bundle(bytes(64 * MB), use_dictionary=False)
    lying = signed(_with_small_sizes(content))
    group = pq.ParquetFile(pa.BufferReader(lying)).metadata.row_group(0)
    assert group.total_byte_size == 1 and group.column(3).total_uncompressed_size == 1
    assert f"unfolds to more than {MB + 100 * len(content)} bytes" in refused(lying, tmp_path)


def _with_small_sizes(content: bytes) -> bytes:
    """The file with 1 as the decompressed size of its large column and of its rows, in the footer alone."""
    group = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    length = int.from_bytes(content[-8:-4], "little")
    data, footer = content[: -8 - length], content[-8 - length :]
    for size in (group.total_byte_size, group.column(3).total_uncompressed_size):
        number = _varint(2 * size)
        small = bytes([0x82, *[0x80] * (len(number) - 2), 0])
        assert number in footer
        footer = footer.replace(number, small)
    return data + footer


def _varint(value: int) -> bytes:
    found = []
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def test_other_columns_are_refused_before_they_are_read(tmp_path: Path, unread: None) -> None:
    more = pa.table({"more": pa.array([bytes(32 * MB)])})
    content = a_bundle(b"x", columns=more, use_dictionary=False)
    assert "has the unknown 'more'" in refused(content, tmp_path)
    strange = pa.table({name: pa.array([b"x"]) for name in ("a\nb" + 90 * "c", "d", "e", "f", "g")})
    reason = refused(a_bundle(b"x", columns=strange), tmp_path)
    assert "\n" not in reason and f"unknown 'a\\nb{37 * 'c'}', 'd', 'e' and 2 more" in reason
    twice = pa.table({"content": pa.array([b"x"])})
    assert "two columns of one name" in refused(a_bundle(b"x", columns=twice), tmp_path)


def test_many_small_files_are_refused_together(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_ALL_BYTES", 1000)
    assert "certificates file 2: unfolds to more than" in refused(packed.read_bytes(), tmp_path)


# The files inside -----------------------------------------------------------------------------------------------------


def repeated(rows: pa.Table, count: int, **changes: Any) -> pa.Table:
    """The first row for ``count`` images."""
    first = rows.slice(0, 1).to_pylist()[0] | changes
    return pa.Table.from_pylist([first | {"index": i} for i in range(count)], schema=rows.schema)


def growing(rows: pa.Table) -> pa.Table:
    """Texts that each begin with the one before."""
    firsts = [rows.slice(0, 1).to_pylist()[0] | {"index": i, "proved_by": "x" * i} for i in range(290)]
    return pa.Table.from_pylist(firsts, schema=rows.schema)


def no_text(rows: pa.Table) -> pa.Table:
    """Bytes that are no UTF-8 in a column of text."""
    place = rows.schema.get_field_index("proved_by")
    wrong = pa.array([b"\xff\xfe"] * rows.num_rows, pa.binary())
    return rows.set_column(place, rows.schema.field(place), wrong.view(pa.string()))


INSIDE: list[tuple[Callable[[TableSpec, pa.Table], bytes], str]] = [
    (lambda spec, rows: encode(repeated(rows, 9000, proved_by="x" * 290), spec), "unfolds to"),
    (
        lambda spec, rows: written(repeated(rows, 9000, proved_by="x" * 290), spec, use_dictionary=False),
        f"unfolds to more than {2 * MB} bytes",
    ),
    (
        lambda spec, rows: written(
            growing(rows), spec, use_dictionary=False, column_encoding={"proved_by": "DELTA_BYTE_ARRAY"}
        ),
        "an encoding that certbench does not write",
    ),
    (lambda spec, rows: written(rows, spec, data_page_version="2.0"), "a page of a kind that certbench"),
    (lambda spec, rows: written(rows, spec, compression="gzip"), "not laid out as certbench writes"),
    (
        lambda spec, rows: written(repeated(rows, 2000), spec, data_page_size=1, write_batch_size=1),
        "20000 pages",
    ),
    (lambda spec, rows: written(no_text(rows), spec), "is not readable Parquet"),
    (lambda spec, rows: written(rows.drop_columns(["verdict"]), spec), "lacks verdict"),
    (lambda spec, rows: b"PAR1" + b"\xff" * 4 + b"PAR1", "a footer of 4294967295 bytes"),
    (lambda spec, rows: b"nothing", "no Parquet file"),
]


@pytest.mark.parametrize(("change", "reason"), INSIDE)
def test_a_file_inside_is_bounded_as_the_bundle_is(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[TableSpec, pa.Table], bytes],
    reason: str,
) -> None:
    monkeypatch.setattr(bundle, "MAX_FILE_BYTES", 2 * MB)
    hostile: Change = with_file("certificates", change)
    assert reason in refused(rewritten(packed, hostile).read_bytes(), tmp_path)


def zigzag(number: int) -> bytes:
    """A whole number as Thrift's compact encoding writes it."""
    number, found = 2 * number, []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_a_field_of_another_kind_than_the_format_names_is_refused(packed: Path, tmp_path: Path) -> None:
    """Where the place of the dictionary is written as a number of 32 bits, pyarrow passes over it, and would read other
    pages than those that were measured."""
    store = unpack(packed, tmp_path / "unpacked").store
    content = bytearray(store.paths("certificates")[0].read_bytes())

    def column() -> pq.ColumnChunkMetaData:
        return pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(0).column(0)

    data, dictionary = column().data_page_offset, column().dictionary_page_offset
    place = bytes(content).rindex(b"\x26" + zigzag(data) + b"\x26" + zigzag(dictionary))
    content[place + 1 + len(zigzag(data))] = 0x25
    assert not column().has_dictionary_page
    with pytest.raises(DataError, match="not laid out as certbench writes files"):
        measure(signed(bytes(content)), CERTIFICATES, Bounds(1000, MB))


def test_a_bundle_holds_no_more_runs_than_boards_can_compare(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_RUNS", 0)
    assert "holds more than 0 runs" in refused(packed.read_bytes(), tmp_path)
    with pytest.raises(UsageError, match="export fewer runs"):
        export(tmp_path, next((tmp_path / "there/results/runs").iterdir()).stem)


def test_every_table_has_its_own_number_of_rows(packed: Path, tmp_path: Path) -> None:
    """A run is read into Python objects, so there must not be a million of them in one file."""

    def two(spec: TableSpec, rows: pa.Table) -> bytes:
        return encode(pa.concat_tables([rows, rows]), spec)

    assert "unfolds to 2 rows, more than the 1 of a runs file" in refused(
        rewritten(packed, with_file("runs", two)).read_bytes(), tmp_path
    )


def test_a_hundredfold_of_real_rows_is_within_every_bound(packed: Path, tmp_path: Path) -> None:
    store = unpack(packed, tmp_path / "unpacked").store
    (path,) = store.paths("certificates")
    rows = repeated(store.load("certificates", path), 200_000)
    content = encode(rows, CERTIFICATES)
    unfolded = measure(content, CERTIFICATES, Bounds(bundle.MAX_ROWS["certificates"], bundle.MAX_FILE_BYTES))
    assert 0.9 < unfolded / rows.nbytes < 1.1


def test_whatever_byte_changes_and_is_signed_again_ends_in_one_line(packed: Path, tmp_path: Path) -> None:
    """The digest keeps out accidents, not those who write it themselves. Some broken footers make pyarrow end the process
    when it is asked for what they say, which this test would not outlive."""
    store = unpack(packed, tmp_path / "unpacked").store
    content = store.paths("certificates")[0].read_bytes()
    drawn = random.Random(0)
    for _ in range(1000):
        broken = bytearray(content)
        for _ in range(drawn.choice((1, 1, 2, 8))):
            broken[drawn.randrange(len(broken))] = drawn.randrange(256)
        try:
            hostile = signed(bytes(broken)) if _MARK in broken else bytes(broken)
            assert measure(hostile, CERTIFICATES, Bounds(1000, MB)) < MB
            assert decode(hostile, CERTIFICATES, "it").nbytes < MB
        except DataError as error:
            assert "\n" not in str(error)
