"""Reads the rows of single files, compressed or not, one after the other.

A file is never held in memory as a whole, except one that is a single JSON list.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lorax_ft.data.bad_rows import STOP, BadRows

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""File types, in the order in which a folder is searched for them."""
COMPRESSED = (".gz", ".zst")
"""Suffixes that may follow those of text files."""
LONGEST_ROW = 32_000_000
"""Bytes of a row of JSON Lines; a longer one is not read into memory."""
# A text column may hold whole documents; csv's own limit is 131,072 characters.
_CSV_FIELD_LIMIT = 2**31 - 1
# What spreadsheets write in place of commas.
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a dataset."""

    fields: dict[str, Any]
    """The row's values by field name."""
    where: str
    """The place it came from, such as "train.jsonl, line 12"."""


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
            return _read_parquet(path)
    hint = ""
    if Path(path).suffix.lower() in (".txt", ".md"):
        hint = '; write each text as a line {"text": "..."} of a .jsonl file'
    raise ValueError(
        f"{path} has an unsupported file type; supported: {', '.join(SUFFIXES)} (text files also "
        f"with .gz or .zst), folders saved by datasets.save_to_disk, or a Hub id{hint}"
    )


def without_nulls(value: Any) -> Any:
    """Removes the null fields of objects, at any depth.

    Arrow gives the objects of a column all fields that any of them has, with nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message: one line is all that a user should see."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__


def _read_jsonl(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object per line; empty lines are skipped."""
    for number, line in _lines(path, longest=LONGEST_ROW):
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
    text = _decode(line, where).strip()
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
    data = b"".join(line for _, line in _lines(path))
    try:
        values = json.loads(_decode(data, path))
    except json.JSONDecodeError as error:
        # Python reports a second object after the first as "Extra data". Many files with one object
        # per line have this suffix.
        if error.msg == "Extra data":
            yield from _read_jsonl(path, bad)
            return
        raise ValueError(f"{path}, line {error.lineno}: {_json_problem(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {_json_problem(error)}") from error
    if not isinstance(values, list):
        raise ValueError(
            f"{path}: contains one {type(values).__name__}, not a list of objects; "
            "put the rows into a list, or one object a line"
        )
    for number, value in enumerate(values, 1):
        try:
            row = _object_row(value, f"{path}, item {number}")
        except ValueError as error:
            bad.met(error)
            continue
        yield row


def _read_csv(path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; all values are text.

    `datasets` 5.2 is not used, because it infers types (the answer "007" becomes 7, "None" becomes
    null), pads short rows, truncates long ones, and does not report the line of a row.
    """
    header: list[str] = []
    first_line_number = 1  # where the row starts; quoted fields may contain line breaks
    usual_limit = csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        reader = csv.reader(_text_lines(path), strict=True)
        for values in reader:
            where = f"{path}, line {first_line_number}"
            first_line_number = reader.line_num + 1
            if not header:
                header = values
                _check_header(header, where)
            elif len(values) == len(header):
                yield Row(fields=dict(zip(header, values, strict=True)), where=where)
            elif values:  # the reader returns an empty list for an empty line
                problem = ValueError(
                    f"{where}: the row's number of fields is {len(values)}, "
                    f"but the header's is {len(header)}; put quotes around fields with commas"
                )
                bad.met(problem)
    except csv.Error as error:
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


def _read_parquet(path: str) -> Iterator[Row]:
    # Imported only when needed: the import is slow, and most runs read JSON Lines.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield table_row(fields, path, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def table_row(fields: dict[str, Any], path: str, number: int) -> Row:
    """Returns a row of an Arrow table."""
    cleaned = {name: without_nulls(value) for name, value in fields.items()}
    return Row(fields=cleaned, where=f"{path}, row {number}")


def _object_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(value).__name__}")
    return Row(fields=value, where=where)


def _lines(path: str, *, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file, decompressed, with their numbers from 1.

    Of a line with more than `longest` bytes only the start comes, one byte more than that.
    """
    number = 0
    # Binary mode splits lines at "\n" only. str.splitlines would also split at characters that
    # JSON allows inside a string, such as U+2028.
    with _open(path) as file:
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


def _text_lines(path: str) -> Iterator[str]:
    """Yields the lines of a text file with their ends, as `csv` wants them."""
    for number, line in _lines(path):
        text = _decode(line, f"{path}, line {number}")
        # newline="" keeps the ends of lines, and splits at the "\r" of old Mac files.
        yield from io.StringIO(text, newline="")


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, decompressed."""
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


def _decode(data: bytes, where: str) -> str:
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


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        message = error.msg[0].lower() + error.msg[1:]
        return f"not JSON: {message} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {first_line(error)}"
