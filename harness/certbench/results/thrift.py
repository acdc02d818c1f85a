"""Thrift's compact encoding, in which Parquet writes its footers and the headers of its pages; reading only, and bounded."""

from __future__ import annotations

from typing import Any

from certbench.errors import DataError

_DEPTH = 8
"""Of structs and lists in each other; Parquet's own are no deeper."""


class Int32(int):
    """A whole number that was written as one of 32 bits: a reader that wants one of 64 takes it for absent, and the other
    way round."""


class Compact:
    """Reads structs from ``content`` between ``place``, which moves on, and ``end``; it never looks beyond.

    Fields come by their numbers. It is stricter than Thrift: numbers of fields rise, so that none comes twice.
    """

    def __init__(self, content: bytes, place: int, end: int) -> None:
        self._content, self.place, self._end = memoryview(content), place, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Whole numbers of 64 bits as ``int`` and of 32 as :class:`Int32`, those of fewer as None, text as ``memoryview``,
        structs as ``dict`` and lists as ``list``.

        Raises:
            DataError: not a struct, too deep, or not at an end before ``end``.
        """
        if depth > _DEPTH:
            raise DataError("has a header nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            if not step:
                raise DataError("has a header whose fields are in no order")
            number += step
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # in lists truth values are bytes
            self._byte()
            return None
        if kind in (4, 5, 6):
            value = self._varint()
            value = (value >> 1) ^ -(value & 1)
            return {4: None, 5: Int32(value), 6: value}[kind]
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind == 9:
            return self._list(depth + 1)
        if kind == 12:
            return self.struct(depth + 1)
        raise DataError("has a header with a value of an unknown kind")

    def _list(self, depth: int) -> list[Any]:
        if depth > _DEPTH:
            raise DataError("has a header nested too deeply")
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        if length > self._end - self.place:  # every entry takes a byte at least
            raise DataError("has a header without an end")
        return [self._value(head & 15, depth) for _ in range(length)]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DataError("has a header with a number without an end")

    def _bytes(self, length: int) -> memoryview:
        if length > self._end - self.place:
            raise DataError("has a header without an end")
        self.place += length
        return self._content[self.place - length : self.place]

    def _byte(self) -> int:
        return self._bytes(1)[0]
