"""The bytes and lines of text files, decompressed as they are read, and their decoding."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lorax_ft.data.rows import first_line
from lorax_ft.files import check_regular


def lines_of(path: str, *, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file, decompressed, with their numbers from 1.

    Of a line with more than `longest` bytes only the start comes, one byte more than that.
    """
    number = 0
    # Binary mode splits lines at "\n" only. str.splitlines would also split at characters that
    # JSON allows inside a string, such as U+2028.
    with open_bytes(path) as file:
        try:
            lines = file if longest is None else _starts_of_lines(file, longest)
            for number, line in enumerate(lines, 1):
                yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} cannot be read after line {number}: {first_line(error)}; "
                "the file is damaged or incomplete"
            ) from error


def _starts_of_lines(file: IO[bytes], longest: int) -> Iterator[bytes]:
    """Yields the lines of a file; of longer ones the first bytes, `longest` + 1."""
    while line := file.readline(longest + 1):
        rest = line
        while len(rest) > longest and not rest.endswith(b"\n"):
            rest = file.readline(longest + 1)
        yield line


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, decompressed."""
    check_regular(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    elif suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(path, compression="zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with open(path, "rb") as file:
            yield file


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 text. Raises ValueError, with the line and the encoding if a mark tells it."""
    try:
        return data.decode("utf-8-sig")  # some editors write a byte order mark first
    except UnicodeDecodeError as error:
        # For a whole file, `where` is only its path, and the line must be counted.
        if ", line" not in where:
            line = data.count(b"\n", 0, error.start) + 1
            where = f"{where}, line {line}"
        hint = _encoding_hint(data)
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1}){hint}; "
            "save the file as UTF-8"
        ) from error


def _encoding_hint(data: bytes) -> str:
    """What another encoding a file has, by the mark at its start."""
    # That of UTF-32 begins with that of UTF-16.
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, name in marks.items():
        if data.startswith(mark):
            return f"; it is {name}"
    return ""
