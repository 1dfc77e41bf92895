"""Reads the rows of Parquet files, some at a time, however far they are compressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorax_ft.data.rows import LONGEST_ROW, Row, first_line, table_row
from lorax_ft.files import check_regular

# Rows of Parquet that are decoded at a time: a file of kilobytes can repeat a long text in each.
_BATCH = 32
# A column of Parquet this large, and compressed this far, holds no texts that somebody wrote.
_BOMB_BYTES, _BOMB_RATIO = 64_000_000, 500


def read_parquet(path: str) -> Iterator[Row]:
    """Yields the rows of a file.

    Raises:
      ValueError: it is damaged, or holds texts of more than 32 MB.
    """
    # Imported only when needed: the import is slow, and most runs read JSON Lines.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        check_regular(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_parquet(file.metadata, path)
            for batch in file.iter_batches(_BATCH):
                if batch.nbytes > _BATCH * LONGEST_ROW:
                    raise ValueError(
                        f"{path}: the rows behind row {number:,} have more than {LONGEST_ROW:,} "
                        "bytes each; split them"
                    )
                for fields in batch.to_pylist():
                    number += 1
                    yield table_row(fields, path, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _check_parquet(metadata: Any, path: str) -> None:
    """Raise for a column that says of itself that it is a bomb."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            if size > _BOMB_BYTES and size > _BOMB_RATIO * max(stored, 1):
                raise ValueError(
                    f"{path}: the column {column.path_in_schema} has {size:,} bytes, compressed to "
                    f"{stored:,}; it is not read"
                )
