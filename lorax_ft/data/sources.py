"""Rows of data from files or the hub, each with the place it came from, so that a later error can name it."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUPPORTED = (".jsonl", ".json", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data set."""

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
    """The rows of files and hub data sets, one source after the other.

    Args:
      paths: files (.jsonl, .json, .csv, .parquet), folders with a file for each split, such as `train.jsonl`, or
        hub ids as "owner/name" or "owner/name:subset".
      split: the split of a folder or a hub data set.
      limit: the largest number of rows, over all sources; what lies behind is not read.
      revision: branch, tag or commit of a hub data set.

    Raises:
      ValueError: a source is missing, unreachable, of an unknown kind or empty, or a row is malformed
        (with file and line).
    """
    rows = itertools.chain.from_iterable(_read(path, split, revision) for path in paths)
    return list(itertools.islice(rows, limit))


def find_split(folder: str, split: str) -> str | None:
    """The file of a split in a folder, such as `train.jsonl`, or None."""
    return next((str(f) for s in SUPPORTED if (f := Path(folder) / f"{split}{s}").is_file()), None)


def _read(path: str, split: str, revision: str | None) -> Iterator[Row]:
    """The rows of one source, at least one."""
    file = Path(path)
    if file.is_file():
        rows = _read_file(path)
    elif file.is_dir():
        split_file = find_split(path, split)
        if split_file is None:
            raise ValueError(
                f"{path} holds no file {' or '.join(split + suffix for suffix in SUPPORTED)}"
            )
        rows = _read_file(split_file)
    elif _is_hub_id(path):
        rows = _read_hub(path, split, revision)
    else:
        raise ValueError(_missing(file))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} holds no rows")


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
        f"{path} is not of a kind that can be read; supported: {', '.join(SUPPORTED)}, or a hub id"
    )


def _read_jsonl(path: str) -> Iterator[Row]:
    """One object a line; empty lines are passed over. Lines end at a line feed only, as JSON demands."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if text := _decode(line, where).strip():
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: {_syntax(error)}") from error
                yield _row(value, where)


def _read_json(path: str) -> Iterator[Row]:
    """One list of objects."""
    try:
        values = json.loads(_decode(Path(path).read_bytes(), path))
    except json.JSONDecodeError as error:
        hint = "; one object a line wants the suffix .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: {_syntax(error)}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {_syntax(error)}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: holds one {type(values).__name__}, not a list of objects")
    for number, value in enumerate(values, 1):
        yield _row(value, f"{path}, item {number}")


def _read_csv(path: str) -> Iterator[Row]:
    """A header, then one row of as many fields each, as text.

    Not by `datasets` 5.2, which infers types (an answer "007" becomes 7, one that reads "None" becomes nothing),
    fills short rows, cuts long ones, and does not say on which line a row stands.
    """
    reader = csv.reader(
        io.StringIO(_decode(Path(path).read_bytes(), path), newline=""), strict=True
    )
    header: list[str] = []
    first = 1  # the line on which the row begins; quoted fields may run over several
    try:
        for values in reader:
            where, first = f"{path}, line {first}", reader.line_num + 1
            if not header:
                header = values
                if repeated := {name for name in header if header.count(name) > 1}:
                    raise ValueError(
                        f"{where}: the header names {', '.join(sorted(repeated))} twice"
                    )
            elif len(values) == len(header):
                yield Row(fields=dict(zip(header, values, strict=True)), where=where)
            elif values:  # an empty line has none
                raise ValueError(
                    f"{where}: its number of fields is {len(values)}, but the header's is {len(header)}"
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {first}: not CSV: {error}") from error


def _read_parquet(path: str) -> Iterator[Row]:
    import datasets

    with (
        tempfile.TemporaryDirectory() as cache
    ):  # the rows go to memory; no copy of the file stays behind
        try:
            with _quiet():
                table = datasets.load_dataset(
                    "parquet", data_files=path, split="train", cache_dir=cache
                )
        except Exception as error:  # whatever the reader raises is about this file
            raise ValueError(
                f"{path} cannot be read as Parquet: {_reason(_root(error))}"
            ) from error
        for number, fields in enumerate(table, 1):
            yield Row(fields=dict(fields), where=f"{path}, row {number}")


def _read_hub(path: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    name, _, subset = path.partition(":")
    try:
        with _quiet():
            table = datasets.load_dataset(name, subset or None, split=split, revision=revision)
    except (
        Exception
    ) as error:  # the network, the hub, the data set's own files: all mean that there are no rows
        raise ValueError(
            f"{path}: no such file, and the hub gave no split {split!r} of a data set of that name: {_reason(error)}"
        ) from error
    for number, fields in enumerate(table, 1):
        yield Row(fields=dict(fields), where=f"{path}, row {number}")


def _is_hub_id(path: str) -> bool:
    """Whether a path that is no file reads as a hub id rather than as a misspelt file."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", path) is not None
    has_suffix = re.search(r"\.[A-Za-z]\w*$", path) is not None
    in_a_folder = "/" in path and Path(path).parent.is_dir()
    return named and not has_suffix and not in_a_folder and not Path(path).exists()


def _missing(file: Path) -> str:
    if not file.parent.is_dir():
        return f"no file {file}: there is no folder {file.parent}"
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.iterdir()], n=1)
    return f"no file {file}" + (f"; the nearest in its folder is {near[0]}" if near else "")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(value).__name__}")
    return Row(fields=value, where=where)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = "" if ", line" in where else f", line {data.count(10, 0, error.start) + 1}"
        raise ValueError(
            f"{where}{line}: not UTF-8 text ({error.reason} at byte {error.start + 1})"
        ) from error


def _syntax(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
    return (
        f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else _reason(error)}"
    )


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and the logs of `datasets` and the hub: what fails becomes our own error."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
