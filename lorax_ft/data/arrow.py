"""Refuses compressed files of Arrow, which would be decompressed as a whole when they are read.

A file is a sequence of messages; each has its metadata as a flatbuffer, and then its columns. The
formats: github.com/apache/arrow/blob/main/format/Message.fbs and
flatbuffers.dev/internals, of which `_field` is the part that is needed.
"""

from __future__ import annotations

import struct
from pathlib import Path

from lorax_ft.data.rows import first_line

# Numbers of fields in Message.fbs.
_KIND, _HEADER = 1, 2  # of a message
_DATA = 1  # of a dictionary: its record batch
_COMPRESSION = 3  # of a record batch
# Kinds of messages.
_DICTIONARY, _RECORDS = 2, 3


def check_uncompressed(file: Path) -> None:
    """Raise if a message of an Arrow stream is compressed, before any is decompressed.

    `datasets` writes none that are. The messages are mapped, so that only their heads are read.

    Raises:
      ValueError: one is, or the file is damaged.
    """
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as mapped:
            reader = pyarrow.ipc.MessageReader.open_stream(mapped)
            for message in reader:
                if _is_compressed(message.metadata.to_pybytes()):
                    raise ValueError(
                        f"{file} is compressed, and would be decompressed without a limit; save it "
                        "with datasets.save_to_disk, or as Parquet"
                    )
    except (pyarrow.ArrowException, OSError, struct.error) as error:
        raise ValueError(
            f"{file.parent} cannot be read as a saved dataset: {first_line(error)}"
        ) from error


def _is_compressed(message: bytes) -> bool:
    """Whether a message, given its metadata, is a record batch whose columns are compressed."""
    table = _follow(message, 0)
    kind, header = _field(message, table, _KIND), _field(message, table, _HEADER)
    if kind is None or header is None:
        return False
    (number,) = struct.unpack_from("<B", message, kind)
    batch: int | None = header
    if number == _DICTIONARY:
        batch = _field(message, _follow(message, header), _DATA)
    elif number != _RECORDS:
        return False
    if batch is None:
        return False
    return _field(message, _follow(message, batch), _COMPRESSION) is not None


def _follow(data: bytes, place: int) -> int:
    """The place of the table that the offset at a place points to."""
    (offset,) = struct.unpack_from("<I", data, place)
    return place + int(offset)


def _field(data: bytes, table: int, number: int) -> int | None:
    """The place of a field of a table; None if the table does not have it."""
    (back,) = struct.unpack_from("<i", data, table)
    names = table - back
    if names < 0:
        raise struct.error("a message is damaged")
    (size,) = struct.unpack_from("<H", data, names)
    entry = 4 + 2 * number
    if entry >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, names + entry)
    return table + int(offset) if offset else None
