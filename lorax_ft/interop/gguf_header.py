"""Walks through the head of a GGUF file before the gguf package does, which believes its counts.

A count of 2^60 numbers, in a file of 100 bytes, would keep it busy for years. The format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from lorax_ft.files import check_regular

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# Bytes of a value by its type.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
LONGEST_STRING = 16_000_000
"""Bytes of a string, such as a chat template."""
LONGEST_NAME = 65_535
"""Bytes of a key."""
MOST_VALUES = 20_000_000
"""Numbers and strings of all arrays; the reader takes some microseconds and 200 bytes for each."""
MOST_AXES = 4
LARGEST_AXIS = 2**40


def check_header(file: Path) -> None:
    """Raise unless the counts and sizes in the head of a file fit into the file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no GGUF file, or is damaged.
    """
    check_regular(file)
    if file.stat().st_size < 24:
        raise ValueError("it has fewer than 24 bytes")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).head()


class _Walk:
    """A place in the head of a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._order = "<"
        self._values = 0

    def head(self) -> None:
        if self._data[:4] != MAGIC:
            raise ValueError("it does not start with GGUF")
        self._at = 4
        # Big-endian files have the version's bytes the other way around.
        if not self._number("I") & 0xFFFF:
            self._order = ">"
        tensors, keys = self._number("Q"), self._number("Q")
        # A key takes 13 bytes at least, a tensor 24.
        self._check_count(keys, 13)
        for _ in range(keys):
            self._string(LONGEST_NAME)
            self._value(self._number("I"))
        self._check_count(tensors, 24)
        for _ in range(tensors):
            self._tensor()

    def _tensor(self) -> None:
        name = self._string(LONGEST_NAME)
        axes = self._number("I")
        if axes > MOST_AXES:
            raise ValueError(f"its tensor {name!r} has {axes:,} axes")
        for _ in range(axes):
            size = self._number("Q")
            if not 0 < size <= LARGEST_AXIS:
                raise ValueError(f"its tensor {name!r} has an axis of size {size:,}")
        self._number("I")  # its type
        offset = self._number("Q")
        if offset > self._size:
            raise ValueError(f"its tensor {name!r} starts at {offset:,}, behind the file")

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._string(LONGEST_STRING)
        elif kind == ARRAY:
            self._array()
        else:
            self._skip(self._size_of(kind))

    def _array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind == ARRAY:
            raise ValueError("it has an array of arrays, which no model's file has")
        self._values += count
        if self._values > MOST_VALUES:
            raise ValueError(f"its arrays have more than {MOST_VALUES:,} values")
        if kind != STRING:
            self._skip(count * self._size_of(kind))
            return
        self._check_count(count, 8)
        for _ in range(count):
            self._string(LONGEST_STRING)

    def _size_of(self, kind: int) -> int:
        if kind not in SIZES:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return SIZES[kind]

    def _check_count(self, count: int, size: int) -> None:
        """Raise where `count` things of `size` bytes at least cannot follow."""
        if count * size > self._size - self._at:
            raise ValueError(f"it is to hold {count:,} more entries, and ends before that")

    def _string(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise ValueError(f"it has a text of {length:,} bytes; supported are {longest:,}")
        start = self._at
        self._skip(length)
        return self._data[start : start + min(length, 80)].decode(errors="replace")

    def _number(self, code: str) -> int:
        start = self._at
        self._skip(struct.calcsize(f"<{code}"))
        (number,) = struct.unpack_from(self._order + code, self._data, start)
        return int(number)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > self._size:
            raise ValueError("it ends within its head")
