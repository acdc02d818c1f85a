"""What the pages of a Parquet file unfold to, read from their own headers before anything is decompressed.

What a file's footer says of sizes is only said. A reader allocates and decompresses what the header of each page says, and
fails where the page holds anything else, so the sum over these headers is the bound that holds. Nothing is accepted but
what certbench's own writer makes, and the footer is read here too: pyarrow ends the process over some broken ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from certbench.errors import DataError
from certbench.results.thrift import Compact, Int32

MAX_FOOTER = 2**20
"""Bytes; certbench's own is a tenth of it at most, since a parsed one takes many times its size."""
MAX_GROUPS = 100
MAX_PAGES = 20_000
"""Of one file; of 2,000,000 rows of 25 columns certbench makes fewer than 4,000."""
_WRITER = b"parquet-cpp-arrow "
_ZSTD = 6
_DATA, _DICTIONARY = 0, 2
_ENCODINGS = {_DATA: (0, 2, 3, 8), _DICTIONARY: (0, 2)}
"""PLAIN, PLAIN_DICTIONARY, RLE (of booleans) and RLE_DICTIONARY. Those that code differences can unfold without end."""
_FOREIGN = "is not laid out as certbench writes files"


@dataclass(frozen=True)
class Group:
    """Some rows of a file, and where each column of them begins and ends in its bytes."""

    rows: int
    columns: tuple[tuple[int, int], ...]


def groups_of(content: bytes) -> list[Group]:
    """The groups of rows of a Parquet file, from its footer.

    Raises:
        DataError: no footer, one beyond a bound, or laid out in another way than certbench writes files.
    """
    if len(content) < 12 or content[-4:] != b"PAR1":
        raise DataError("is truncated, or no Parquet file")
    length, end = int.from_bytes(content[-8:-4], "little"), len(content) - 8
    if length > min(MAX_FOOTER, end):
        raise DataError(f"has a footer of {length} bytes, more than the {MAX_FOOTER} it may have")
    reader = Compact(content, end - length, end)
    footer = reader.struct()
    groups = footer.get(4)
    writer = footer.get(6)
    if not isinstance(groups, list) or not isinstance(writer, memoryview) or reader.place != end:
        raise DataError(_FOREIGN)
    if len(groups) > MAX_GROUPS:
        raise DataError(f"has {len(groups)} groups of rows, more than the {MAX_GROUPS} it may have")
    found = [_group(group, end - length) for group in groups]
    if not bytes(writer[:40]).startswith(_WRITER) or footer.get(3) != sum(group.rows for group in found):
        raise DataError(_FOREIGN)
    return found


def _group(fields: Any, end: int) -> Group:
    (rows,) = _counts(fields, 3)
    columns = fields.get(1)
    if not isinstance(columns, list):
        raise DataError(_FOREIGN)
    return Group(rows, tuple(_column(column, rows, end) for column in columns))


def _column(fields: Any, rows: int, end: int) -> tuple[int, int]:
    """Where a reader begins and ends to read a column: at its dictionary, where that is said to come first."""
    about = fields.get(3) if isinstance(fields, dict) and not set(fields) - {2, 3} else None
    if not isinstance(about, dict):
        raise DataError(_FOREIGN)
    (codec,) = _counts(about, 4, kind=Int32)
    values, length, start, dictionary = _counts({11: 0} | about, 5, 7, 9, 11)
    begin = dictionary if 0 < dictionary < start else start
    if codec != _ZSTD or values != rows:
        raise DataError(_FOREIGN)
    if begin + length > end:
        raise DataError("has a column outside of itself")
    return begin, begin + length


def page_bytes(content: bytes, groups: list[Group], most: int, dictionaries: bool) -> int:
    """The bytes of all pages once decompressed.

    Args:
        most: as soon as it is exceeded the file is refused.
        dictionaries: whether values may be named by their places in a dictionary, so that a long one repeats for a few bits.

    Raises:
        DataError: more than ``most``, or laid out in another way than certbench writes files.
    """
    total = pages = 0
    for group in groups:
        for begin, end in group.columns:
            for unfolded in _pages(content, begin, end, group.rows, dictionaries):
                total, pages = total + unfolded, pages + 1
                if total > most or pages > MAX_PAGES:
                    raise DataError(f"unfolds to more than {most} bytes or {MAX_PAGES} pages")
    return total


def _pages(content: bytes, place: int, end: int, rows: int, dictionaries: bool) -> Iterator[int]:
    """The decompressed size of each page of one column in one group of rows."""
    values = 0
    may_be_dictionary = dictionaries
    while place < end:
        reader = Compact(content, place, end)
        kind, unfolded, stored, count = _page(reader.struct())
        if kind == _DICTIONARY and not may_be_dictionary:
            raise DataError("has a dictionary of values where none may be")
        if count > rows:
            raise DataError(f"has a page of {count} values for {rows} rows")
        values += count if kind == _DATA else 0
        may_be_dictionary = False
        place = reader.place + stored
        yield unfolded
    if place != end or values != rows:
        raise DataError("has pages that do not fill their column")


def _page(header: Mapping[int, Any]) -> tuple[int, int, int, int]:
    """Kind, size once decompressed, size as stored, number of values."""
    kind, unfolded, stored = _counts(header, 1, 2, 3, kind=Int32)
    if kind not in _ENCODINGS:
        raise DataError("has a page of a kind that certbench does not write")
    count, encoding = _counts(header.get(5 if kind == _DATA else 7), 1, 2, kind=Int32)
    if encoding not in _ENCODINGS[kind]:
        raise DataError("has a page in an encoding that certbench does not write")
    return kind, unfolded, stored, count


def _counts(fields: Any, *numbers: int, kind: type[int] = int) -> list[int]:
    """Fields that are whole numbers from 0, as far as 32 bits go: a reader may cut off what is larger.

    They are of the very ``kind`` that the format names, since pyarrow passes over a field of another.
    """
    values = [fields.get(number) for number in numbers] if isinstance(fields, dict) else []
    found = [value for value in values if type(value) is kind and 0 <= value < 2**31]
    if len(found) != len(numbers):
        raise DataError(_FOREIGN)
    return found
