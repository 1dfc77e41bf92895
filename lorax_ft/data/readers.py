"""Reads the rows of single files, compressed or not, one after the other.

A file is never held in memory as a whole, however far it is compressed.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorax_ft.data import json_list
from lorax_ft.data.bad_rows import STOP, BadRows
from lorax_ft.data.parquet import read_parquet
from lorax_ft.data.rows import LONGEST_ROW, Row, first_line
from lorax_ft.data.text_lines import decode, lines_of, open_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""File types, in the order in which a folder is searched for them."""
COMPRESSED = (".gz", ".zst")
"""Suffixes that may follow those of text files."""
# Bytes of a JSON list that are read at a time.
_CHUNK = 1 << 20
# What spreadsheets write in place of commas.
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def file_type(path: str) -> str | None:
    """Returns the suffix that says how to read a file, in lower case; None for an unknown one.

    >>> file_type("data/train.JSONL.gz"), file_type("a.csv"), file_type("a.parquet.gz")
    ('.jsonl', '.csv', None)
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".ndjson":
        suffix = ".jsonl"
    # Parquet compresses its columns itself.
    if suffix not in SUFFIXES or (compressed and suffix == ".parquet"):
        return None
    return suffix


def read_file(path: str, *, bad: BadRows = STOP) -> Iterator[Row]:
    """Yields the rows of a file; `bad` says what happens to rows that are malformed.

    Raises:
      ValueError: the file type is unknown, or the file or a row is malformed.
    """
    match file_type(path):
        case ".jsonl":
            return _read_jsonl(path, bad)
        case ".json":
            return _read_json(path, bad)
        case ".csv":
            return _read_csv(path, bad)
        case ".parquet":
            return read_parquet(path, bad)
    hint = ""
    if Path(path).suffix.lower() in (".txt", ".md"):
        hint = '; write each text as a line {"text": "..."} of a .jsonl file'
    raise ValueError(
        f"{path} has an unsupported file type; supported: {', '.join(SUFFIXES)} (text files also "
        f"with .gz or .zst), folders saved by datasets.save_to_disk, or a Hub id{hint}"
    )


def _read_jsonl(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object per line; empty lines are skipped."""
    for number, line in lines_of(path, longest=LONGEST_ROW):
        try:
            row = _json_row(line, path, number)
        except ValueError as error:
            bad.met(error)
            continue
        if row is not None:
            yield row


def _json_row(line: bytes, path: str, number: int) -> Row | None:
    """The row on a line; None on an empty one."""
    where = f"{path}, line {number}"
    if len(line) > LONGEST_ROW:
        raise ValueError(
            f"{where}: the row has more than {LONGEST_ROW:,} bytes; split it into several rows"
        )
    text = decode(line, where).strip()
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ""
        # The first line of a list that is spread over many lines.
        if number == 1 and text in ("[", "{"):
            hint = "; a file that is one JSON list needs the suffix .json"
        raise ValueError(f"{where}: {_json_problem(error)}{hint}") from error
    return _object_row(value, where)


def _read_json(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a file that is one JSON list of objects, or has one object per line."""
    if _first_character(path) != b"[":
        yield from _read_no_list(path, bad)
        return
    values = json_list.items(_chunks(path), longest=LONGEST_ROW)
    number = 0
    while True:
        number += 1
        try:
            value = next(values, _END)
        except json_list.BadListError as error:
            raise ValueError(f"{path}, line {error.line}: {error}") from error
        if value is _END:
            return
        try:
            row = _object_row(value, f"{path}, item {number}")
        except ValueError as error:
            bad.met(error)
            continue
        yield row


_END = object()


def _read_no_list(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a .json file with one object per line, as many have."""
    data = b"".join(itertools.islice(_chunks(path), LONGEST_ROW // _CHUNK + 1))
    try:
        value = json.loads(decode(data, path)) if len(data) <= LONGEST_ROW else None
    except json.JSONDecodeError as error:
        # Python reports a second object after the first as "Extra data".
        if error.msg != "Extra data":
            raise ValueError(f"{path}, line {error.lineno}: {_json_problem(error)}") from error
        value = None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_json_problem(error)}") from error
    if value is not None:
        raise ValueError(
            f"{path}: contains one {type(value).__name__}, not a list of objects; "
            "put the rows into a list, or one object a line"
        )
    yield from _read_jsonl(path, bad)


def _first_character(path: str) -> bytes:
    """The first character of a file, without a byte order mark and spaces; b"" of an empty one."""
    for chunk in _chunks(path):
        text = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
        if text:
            return text[:1]
    return b""


def _chunks(path: str) -> Iterator[bytes]:
    """Yields a file, decompressed, in pieces."""
    lines = 0
    with open_bytes(path) as file:
        try:
            while chunk := file.read(_CHUNK):
                lines += chunk.count(b"\n")
                yield chunk
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} cannot be read after line {lines}: {first_line(error)}; "
                "the file is damaged or incomplete"
            ) from error


def _read_csv(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; all values are text.

    `datasets` 5.2 is not used, because it infers types (the answer "007" becomes 7, "None" becomes
    null), pads short rows, truncates long ones, and does not report the line of a row.
    """
    header: list[str] = []
    for line, values in csv_rows(path):
        where = f"{path}, line {line}"
        if not header:
            header = values
            _check_header(header, where)
        elif len(values) == len(header):
            yield Row(fields=dict(zip(header, values, strict=True)), where=where)
        else:
            problem = ValueError(
                f"{where}: the row's number of fields is {len(values)}, "
                f"but the header's is {len(header)}; put quotes around fields with commas"
            )
            bad.met(problem)


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV file that are not empty, each with the line on which it starts.

    Raises:
      ValueError: it is no file, or a row is malformed, not UTF-8 or has more than 32,000,000
        characters. After such a row nobody knows where the next one starts.
    """
    first_line_number = 1  # where the row starts; quoted fields may contain line breaks
    # csv has its own limit of 131,072 characters; a column may hold whole documents.
    usual_limit = csv.field_size_limit(LONGEST_ROW)
    lines = _RowLines(path)
    try:
        reader = csv.reader(lines, strict=True)
        for values in reader:
            lines.start_row()
            if values:  # the reader returns an empty list for an empty line
                yield first_line_number, values
            first_line_number = reader.line_num + 1
    except (csv.Error, _LongRowError) as error:
        raise ValueError(f"{path}, line {first_line_number}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(usual_limit)


def _check_header(header: Sequence[str], where: str) -> None:
    for separator, name in _OTHER_SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(f"{where}: the columns are separated by {name}; save it with commas")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        # The row is a dict, so one of two columns with the same name would be lost.
        raise ValueError(f"{where}: the header repeats {', '.join(sorted(repeated))}")


def _object_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(value).__name__}")
    return Row(fields=value, where=where)


class _LongRowError(ValueError):
    """A row has too many characters."""


class _RowLines:
    """The lines of a CSV file, which raise where one row takes too many of them."""

    def __init__(self, path: str) -> None:
        self._lines = _text_lines(path)
        self._size = 0

    def start_row(self) -> None:
        """Counts anew, as the next line belongs to another row."""
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._size += len(line)
        if self._size > LONGEST_ROW:
            raise _LongRowError(
                f"the row has more than {LONGEST_ROW:,} characters; split it, or end its quotes"
            )
        return line


def _text_lines(path: str) -> Iterator[str]:
    """Yields the lines of a text file with their ends, as `csv` wants them."""
    for number, line in lines_of(path, longest=LONGEST_ROW):
        text = decode(line, f"{path}, line {number}")
        # newline="" keeps the ends of lines, and splits at the "\r" of old Mac files.
        yield from io.StringIO(text, newline="")


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        message = error.msg[0].lower() + error.msg[1:]
        return f"not JSON: {message} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {first_line(error)}"
