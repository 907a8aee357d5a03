"""The header of a GGUF file, gone through before the package gguf reads it: that believes every count in it.

An array of 10^12 elements keeps it busy for days in a file of 4 KB, and arrays in arrays end its recursion.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by gguf's number of its type."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 24  # of all arrays: the package makes an object of each, and the largest vocabularies have 2^18


def check_header(path: Path) -> None:
    """Raises `ValueError` where a count or a length in the header is more than the file has room for."""
    with open(path, "rb") as file:
        _Header(file, path.stat().st_size).check()


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._elements = file, size, 0

    def check(self) -> None:
        self._file.seek(4)
        if not self._number("<I") & 0xFFFF:
            return  # another byte order, which the reader says
        tensors, keys = self._number("<Q"), self._number("<Q")
        for _ in range(self._room(keys, 8 + 4 + 1, "keys")):
            self._string()
            self._value(self._number("<I"))
        for _ in range(self._room(tensors, 8 + 4 + 4 + 8, "tensors")):
            self._string()
            if (dimensions := self._number("<I")) > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions, and at most {_MOST_DIMENSIONS} are known")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array()
        else:
            self._skip(self._size_of(kind))

    def _array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _ARRAY:
            raise ValueError("it has arrays in arrays, which no model of this family has")
        self._elements += self._room(count, 8 if kind == _STRING else self._size_of(kind), "elements in an array")
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(f"its arrays have {self._elements} elements, and at most {_MOST_ELEMENTS} are read")
        if kind == _STRING:
            for _ in range(count):
                self._string()
        else:
            self._skip(count * self._size_of(kind))

    @staticmethod
    def _size_of(kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value is of the kind {kind}, which is not known")
        return _SIZES[kind]

    def _room(self, count: int, each: int, what: str) -> int:
        """`count`, of things that take at least so many bytes each."""
        if count * each > self._size - self._file.tell():
            raise ValueError(f"it announces {count} {what} and has {self._size} bytes")
        return count

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _skip(self, count: int) -> None:
        self._file.seek(self._room(count, 1, "bytes of a value"), 1)

    def _number(self, kind: str) -> int:
        number: int
        (number,) = struct.unpack(kind, self._file.read(struct.calcsize(kind)))
        return number
