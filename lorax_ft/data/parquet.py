"""Reads the rows of Parquet files, some at a time, however far they are compressed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lorax_ft.data.bad_rows import STOP, BadRows
from lorax_ft.data.rows import LONGEST_ROW, Row, first_line, table_rows
from lorax_ft.files import check_regular

# Rows of Parquet that are decoded at a time: a file of kilobytes can repeat a long text in each.
_BATCH = 32
# Rows of Parquet this large, and compressed this far, hold no texts that somebody wrote.
_BOMB_BYTES, _BOMB_RATIO = 64_000_000, 500


def read_parquet(path: str, bad: BadRows = STOP) -> Iterator[Row]:
    """Yields the rows of a file; `bad` says what happens to rows of more than 32 MB.

    Raises:
      ValueError: it is damaged, or compressed as no text is.
    """
    # Imported only when needed: the import is slow, and most runs read JSON Lines.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        check_regular(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_parquet(file.metadata, path)
            for batch in file.iter_batches(_batch_rows(file.metadata)):
                yield from table_rows(batch, path, bad, first=number + 1)
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _batch_rows(metadata: Any) -> int:
    """How many rows to decode at a time: one by one where some must be large."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > group.num_rows * LONGEST_ROW / _BATCH:
            return 1
    return _BATCH


def _check_parquet(metadata: Any, path: str) -> None:
    """Raise for a file that says of itself that it is a bomb."""
    # By row groups: asked about a damaged column, pyarrow 26 ends the process.
    stored = os.path.getsize(path)
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).total_byte_size
        if size > max(_BOMB_BYTES, _BOMB_RATIO * stored):
            raise ValueError(
                f"{path}: its row group {number} has {size:,} bytes, in a file of {stored:,}; it "
                "is not read"
            )
