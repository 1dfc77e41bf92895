"""A row of a dataset, and the place it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lorax_ft.data.bad_rows import BadRows

LONGEST_ROW = 32_000_000
"""Bytes of a row; a longer one is not read into memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a dataset."""

    fields: dict[str, Any]
    """The row's values by field name."""
    where: str
    """The place it came from, such as "train.jsonl, line 12"."""


def table_row(fields: dict[str, Any], path: str, number: int) -> Row:
    """Returns a row of an Arrow table."""
    cleaned = {name: without_nulls(value) for name, value in fields.items()}
    return Row(fields=cleaned, where=f"{path}, row {number}")


def table_rows(table: Any, path: str, bad: BadRows, *, first: int) -> Iterator[Row]:
    """Yields the rows of an Arrow table, or of a batch of one, numbered from `first` on.

    A row of more than 32 MB is not made Python's own, which would copy it.
    """
    if table.nbytes <= LONGEST_ROW:
        for number, fields in enumerate(table.to_pylist(), first):
            yield table_row(fields, path, number)
        return
    for i in range(table.num_rows):
        row = table.slice(i, 1)  # copies nothing
        if row.nbytes > LONGEST_ROW:
            bad.met(long_row(path, first + i))
            continue
        (fields,) = row.to_pylist()
        yield table_row(fields, path, first + i)


def long_row(path: str, number: int) -> ValueError:
    """Returns the error of a row of a table that has too many bytes."""
    return ValueError(
        f"{path}, row {number}: the row has more than {LONGEST_ROW:,} bytes; split it into several "
        "rows"
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
