"""Finds the files, saved datasets and Hub datasets of a run, and reads their rows.

Each row carries the place it came from, so a later error can name it.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax_ft.data.arrow import check_uncompressed
from lorax_ft.data.bad_rows import STOP, BadRows
from lorax_ft.data.readers import COMPRESSED, SUFFIXES, file_type, read_file
from lorax_ft.data.rows import LONGEST_ROW, Row, first_line, long_row, table_row
from lorax_ft.files import check_regular, read_json, within
from lorax_ft.offline import hub_or_cache

# What `datasets.save_to_disk` writes into the folder of a Dataset and of a DatasetDict.
_SAVED = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
# Rows of a dataset that are decoded at a time.
_BATCH = 256


class Source(NamedTuple):
    """One entry of `data.train`."""

    path: str
    weight: float = 1.0
    """Passes over its rows in an epoch."""


def parse_sources(entries: Sequence[str]) -> list[Source]:
    """Parses the entries of `data.train`, each "path" or "path=weight".

    Raises:
      ValueError: a weight is not above 0.

    >>> parse_sources(["a.jsonl", "b.jsonl=0.5"])
    [Source(path='a.jsonl', weight=1.0), Source(path='b.jsonl', weight=0.5)]
    """
    sources = []
    for entry in entries:
        path, equals, text = entry.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        # A path may contain "=" itself, as in "split=train/rows.jsonl" or "date=20261126".
        if not equals or math.isnan(weight) or Path(entry).exists():
            sources.append(Source(entry))
            continue
        if not 0 < weight < math.inf:
            raise ValueError(f"data.train: the weight of {path} is {text}; it must be above 0")
        sources.append(Source(path, weight))
    return sources


def read_rows(
    paths: Sequence[str],
    *,
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    bad: BadRows = STOP,
) -> Iterator[Row]:
    """Yields the rows of files and datasets, one source after the other.

    Args:
      paths: files (.jsonl, .json, .csv, .parquet; text files also with .gz or .zst), patterns of
        files such as "data/*.jsonl", folders with one file per split, such as `train.jsonl`,
        folders that `datasets.save_to_disk` wrote, or Hub ids as "owner/name" or
        "owner/name:subset". "path[:N]" is the first N rows of a source.
      split: the split to read of a folder or a Hub dataset.
      limit: the largest number of rows over all sources; rows after that are not read.
      revision: branch, tag or commit of a Hub dataset.
      bad: what happens to rows that are malformed.

    Raises:
      ValueError: a source is missing, unreachable, empty or of an unsupported file type, or a row
        is malformed (the message has the file and line).
    """
    rows = itertools.chain.from_iterable(_read(path, split, revision, bad) for path in paths)
    return itertools.islice(rows, limit)


def split_limit(path: str) -> tuple[str, int | None]:
    """The source of "path[:N]", and N, the largest number of its rows to read; else None.

    >>> split_limit("chat.jsonl[:1000]"), split_limit("chat.jsonl")
    (('chat.jsonl', 1000), ('chat.jsonl', None))
    """
    limited = re.fullmatch(r"(.+)\[:(\d{1,12})\]", path)
    if limited is None or Path(path).exists():
        return path, None
    return limited[1], int(limited[2])


def has_split(path: str, split: str) -> bool:
    """Whether a path is a folder that holds this split."""
    folder = Path(split_limit(path)[0]).expanduser()
    if not folder.is_dir():
        return False
    if (folder / _SAVED_SPLITS).is_file():
        return (folder / split).is_dir()
    return bool(_split_files(folder, split))


def _read(path: str, split: str, revision: str | None, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of one source, which must have at least one."""
    path, limit = split_limit(path)
    if limit == 0:
        raise ValueError(f"{path}[:0] takes no rows; give a number above 0")
    empty = True
    bad_before = bad.count
    for row in itertools.islice(_open(path, split, revision, bad), limit):
        empty = False
        yield row
    if not empty:
        return
    if bad.count > bad_before:
        raise ValueError(f"{path} contains no row that can be read; the last: {bad.problems[-1]}")
    raise ValueError(f"{path} contains no rows")


def _open(path: str, split: str, revision: str | None, bad: BadRows) -> Iterator[Row]:
    """Chooses the reader of a source."""
    if "://" in path:
        raise ValueError(
            f"{path}: data is read from local files and from the Hub; download it, or give a Hub "
            "id as owner/name"
        )
    path = os.path.expanduser(path)
    file = Path(path)
    if file.is_file():
        return read_file(path, bad=bad)
    if file.is_dir():
        return _read_folder(file, split, bad)
    if glob.has_magic(path):
        files = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"no file matches {path}")
        return _read_files(files, bad)
    if _is_hub_id(path):
        return _read_hub(path, split, revision, bad)
    raise ValueError(_missing(file))


def _read_folder(folder: Path, split: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a split of a folder."""
    if (folder / _SAVED_SPLITS).is_file():
        if not (folder / split).is_dir():
            splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise ValueError(
                f"{folder} has no split {split!r}; it has {', '.join(splits)}: "
                f"give --data.split or --data.validation_split"
            )
        return _read_saved(folder / split, bad)
    if (folder / _SAVED).is_file():
        return _read_saved(folder, bad)
    files = _split_files(folder, split)
    if files:
        return _read_files(files, bad)
    names = ", ".join(split + suffix for suffix in SUFFIXES)
    message = f"{folder} contains none of {names}"
    others = sorted(entry.name for entry in folder.iterdir() if file_type(entry.name))
    if others:
        suffix = "".join(Path(others[0]).suffixes)
        message += f'; to read all of its files, give "{folder}/*{suffix}"'
    raise ValueError(message)


def _split_files(folder: Path, split: str) -> list[str]:
    """Returns the files of a split in a folder: `train.jsonl`, or the shards `train-00000-of-…`.

    The Hub's own folders have them below `data`.
    """
    for place in (folder, folder / "data"):
        for suffix in _all_suffixes():
            file = place / f"{split}{suffix}"
            if file.is_file():
                return [str(file)]
            shards = sorted(str(path) for path in place.glob(f"{glob.escape(split)}-*{suffix}"))
            if shards:
                return shards
    return []


def _all_suffixes() -> list[str]:
    """Suffixes of files that can be read, the plain ones first."""
    compressed: list[str] = []
    for suffix in SUFFIXES:
        compressed.extend(suffix + end for end in COMPRESSED)
    return [*SUFFIXES, *(suffix for suffix in compressed if file_type("a" + suffix))]


def _read_files(files: Iterable[str], bad: BadRows) -> Iterator[Row]:
    return itertools.chain.from_iterable(read_file(file, bad=bad) for file in files)


def _read_saved(folder: Path, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a Dataset that `save_to_disk` wrote; they are not loaded into memory."""
    # Imported only when needed: the import is slow, and most runs read JSON Lines.
    import datasets

    _check_saved(folder)
    try:
        with _quiet_datasets():
            table = datasets.load_from_disk(str(folder))
    # The library has no common base class of errors; all of them are about this folder.
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read as a saved dataset: {first_line(_root_cause(error))}"
        ) from error
    yield from _table_rows(table, str(folder), bad)


def _check_saved(folder: Path) -> None:
    """Raise where a saved dataset names a file elsewhere, one that is no file or is compressed."""
    try:
        files = read_json(within(folder, _SAVED)).get("_data_files")
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read as a saved dataset: {error}") from error
    for entry in files if isinstance(files, list) else ():
        name = entry.get("filename") if isinstance(entry, dict) else None
        if isinstance(name, str):
            file = within(folder, name)
            check_regular(file)
            check_uncompressed(file)


def _read_hub(path: str, split: str, revision: str | None, bad: BadRows) -> Iterator[Row]:
    import datasets

    name, _, subset = path.partition(":")
    unreachable = ""
    try:
        with (
            _quiet_datasets(),
            hub_or_cache(name, repo_type="dataset", revision=revision) as unreachable,
        ):
            table = datasets.load_dataset(name, subset or None, split=split, revision=revision)
    # Whether the network, the Hub or the dataset's own files fail, there are no rows to read.
    except Exception as error:
        raise ValueError(
            f"{path}: there is no such file, and loading split {split!r} of a Hub dataset with "
            f"that name failed: {unreachable or first_line(error)}"
        ) from error
    yield from _table_rows(table, path, bad)


def _table_rows(table: Any, path: str, bad: BadRows) -> Iterator[Row]:
    """Yields the rows of a `datasets.Dataset`, which decodes them from Arrow."""
    arrow = table.with_format("arrow")
    for start in range(0, len(table), _BATCH):
        part = range(start, min(start + _BATCH, len(table)))
        if arrow[start : part.stop].nbytes <= LONGEST_ROW:
            columns = table[start : part.stop]
            for number, values in enumerate(zip(*columns.values(), strict=True), start + 1):
                yield table_row(dict(zip(columns, values, strict=True)), path, number)
            continue
        for i in part:
            if arrow[i].nbytes > LONGEST_ROW:
                bad.met(long_row(path, i + 1))
            else:
                yield table_row(table[i], path, i + 1)


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
    path, equals, weight = str(file).rpartition("=")
    if equals and Path(path).exists():
        return f"no file {file}; {weight!r} is no weight of {path}: give a number, as in {path}=0.5"
    names = [entry.name for entry in file.parent.iterdir()]
    near = difflib.get_close_matches(file.name, names, n=1)
    if not near:
        return f"no file {file}"
    return f"no file {file}; the closest name in its folder is {near[0]}"


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
