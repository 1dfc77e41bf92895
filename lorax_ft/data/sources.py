"""Reads dataset rows from files and the Hub.

Each row carries the place it came from, so a later error can name it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import io
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SUPPORTED = (".jsonl", ".json", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a dataset."""

    fields: dict[str, Any]
    """The row's values by field name."""
    where: str
    """The place it came from, such as "train.jsonl, line 12"."""


def read_rows(
    paths: Sequence[str],
    *,
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
) -> list[Row]:
    """Reads the rows of files and Hub datasets, one source after the other.

    Args:
      paths: files (.jsonl, .json, .csv, .parquet), folders with one file per split, such as
        `train.jsonl`, or Hub ids as "owner/name" or "owner/name:subset".
      split: the split to read of a folder or a Hub dataset.
      limit: the largest number of rows over all sources; rows after that are not read.
      revision: branch, tag or commit of a Hub dataset.

    Raises:
      ValueError: a source is missing, unreachable, empty or of an unsupported file type, or a row
        is malformed (the message has the file and line).
    """
    rows = itertools.chain.from_iterable(_read(path, split, revision) for path in paths)
    return list(itertools.islice(rows, limit))


def find_split(folder: str, split: str) -> str | None:
    """Returns the file of a split in a folder, such as `train.jsonl`, or None."""
    for suffix in SUPPORTED:
        file = Path(folder) / f"{split}{suffix}"
        if file.is_file():
            return str(file)
    return None


def _read(path: str, split: str, revision: str | None) -> Iterator[Row]:
    """Yields the rows of one source, which must have at least one."""
    empty = True
    for row in _open(path, split, revision):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} contains no rows")


def _open(path: str, split: str, revision: str | None) -> Iterator[Row]:
    """Chooses the reader of a source."""
    file = Path(path)
    if file.is_file():
        return _read_file(path)
    if file.is_dir():
        split_file = find_split(path, split)
        if split_file is None:
            names = ", ".join(split + suffix for suffix in SUPPORTED)
            raise ValueError(f"{path} contains none of {names}")
        return _read_file(split_file)
    if _is_hub_id(path):
        return _read_hub(path, split, revision)
    raise ValueError(_missing(file))


def _read_file(path: str) -> Iterator[Row]:
    match Path(path).suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".json":
            return _read_json(path)
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
    raise ValueError(
        f"{path} has an unsupported file type; supported: {', '.join(SUPPORTED)}, or a Hub id"
    )


def _read_jsonl(path: str) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object per line; empty lines are skipped."""
    # Binary mode splits lines at "\n" only. str.splitlines would also split at characters that
    # JSON allows inside a string, such as U+2028.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {_json_problem(error)}") from error
            yield _object_row(value, where)


def _read_json(path: str) -> Iterator[Row]:
    """Yields the rows of a file that is one JSON list of objects."""
    try:
        values = json.loads(_decode(Path(path).read_bytes(), path))
    except json.JSONDecodeError as error:
        hint = ""
        # Python reports a second object after the first as "Extra data": the file is JSON Lines.
        if error.msg == "Extra data":
            hint = "; a file with one object per line needs the suffix .jsonl"
        raise ValueError(f"{path}, line {error.lineno}: {_json_problem(error)}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {_json_problem(error)}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: contains one {type(values).__name__}, not a list of objects")
    for number, value in enumerate(values, 1):
        yield _object_row(value, f"{path}, item {number}")


def _read_csv(path: str) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; all values are text.

    `datasets` 5.2 is not used, because it infers types (the answer "007" becomes 7, "None" becomes
    null), pads short rows, truncates long ones, and does not report the line of a row.
    """
    # newline="" leaves line breaks to the csv module, which must see those in quoted fields as is.
    text = io.StringIO(_decode(Path(path).read_bytes(), path), newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] = []
    first_line = 1  # where the current row starts; quoted fields may contain line breaks
    try:
        for values in reader:
            where = f"{path}, line {first_line}"
            first_line = reader.line_num + 1
            if not header:
                header = values
                _check_header(header, where)
            elif len(values) == len(header):
                yield Row(fields=dict(zip(header, values, strict=True)), where=where)
            elif values:  # the reader returns an empty list for an empty line
                raise ValueError(
                    f"{where}: the row's number of fields is {len(values)}, "
                    f"but the header's is {len(header)}"
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {first_line}: not CSV: {error}") from error


def _check_header(header: Sequence[str], where: str) -> None:
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        # The row is a dict, so one of two columns with the same name would be lost.
        raise ValueError(f"{where}: the header repeats {', '.join(sorted(repeated))}")


def _read_parquet(path: str) -> Iterator[Row]:
    # Imported only when needed: the import is slow, and most runs read JSON Lines.
    import datasets

    # A cache of its own, deleted afterwards: the default one would keep a copy of the file.
    with tempfile.TemporaryDirectory() as cache:
        try:
            with _quiet_datasets():
                table = datasets.load_dataset(
                    "parquet", data_files=path, split="train", cache_dir=cache
                )
        # The reader has no common base class of errors; all of them are about this file.
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as Parquet: {_first_line(_root_cause(error))}"
            ) from error
        yield from _table_rows(table, path)


def _read_hub(path: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    name, _, subset = path.partition(":")
    try:
        with _quiet_datasets():
            table = datasets.load_dataset(name, subset or None, split=split, revision=revision)
    # Whether the network, the Hub or the dataset's own files fail, there are no rows to read.
    except Exception as error:
        raise ValueError(
            f"{path}: there is no such file, and loading split {split!r} of a Hub dataset with "
            f"that name failed: {_first_line(error)}"
        ) from error
    yield from _table_rows(table, path)


def _table_rows(table: Iterable[dict[str, Any]], path: str) -> Iterator[Row]:
    for number, fields in enumerate(table, 1):
        yield Row(fields=dict(fields), where=f"{path}, row {number}")


def _is_hub_id(path: str) -> bool:
    """Whether a path that does not exist looks like a Hub id rather than a misspelled file."""
    is_named_like_one = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", path) is not None
    has_suffix = re.search(r"\.[A-Za-z]\w*$", path) is not None
    in_a_folder = "/" in path and Path(path).parent.is_dir()
    # A socket or a device is neither a file nor a folder, but it does exist.
    exists = Path(path).exists()
    return is_named_like_one and not has_suffix and not in_a_folder and not exists


def _missing(file: Path) -> str:
    """Describes a missing file, with the closest existing name as a hint."""
    if not file.parent.is_dir():
        return f"no file {file}: there is no folder {file.parent}"
    names = [entry.name for entry in file.parent.iterdir()]
    near = difflib.get_close_matches(file.name, names, n=1)
    if not near:
        return f"no file {file}"
    return f"no file {file}; the closest name in its folder is {near[0]}"


def _object_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(value).__name__}")
    return Row(fields=value, where=where)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors write a byte order mark first
    except UnicodeDecodeError as error:
        # For a whole file, `where` is only its path, and the line must be counted.
        if ", line" not in where:
            line = data.count(b"\n", 0, error.start) + 1
            where = f"{where}, line {line}"
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1})"
        ) from error


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        message = error.msg[0].lower() + error.msg[1:]
        return f"not JSON: {message} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error's message: one line is all that a user should see."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__


def _root_cause(error: BaseException) -> BaseException:
    # `datasets` wraps its reader's error in one whose message does not say what is wrong.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silences the progress bars and logs of `datasets` and the Hub client.

    Failures reach the user as errors that the callers raise.
    """
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
