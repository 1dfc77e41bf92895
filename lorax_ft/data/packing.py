"""Packs samples into rows, and builds the arrays that stop them from attending to each other.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from lorax_ft.data.chat import Sample
from lorax_ft.data.store import Piece

Batch = dict[str, np.ndarray]
"""Arrays [B, T], as `collate` makes them."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Packs samples into rows of at most `max_length` tokens, by best-fit decreasing.

    No sample is split.

    Args:
      lengths: tokens of each sample.
      max_length: tokens of a row.

    Returns:
      The indices of the samples in each row.

    Raises:
      ValueError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row index), sorted for the bisection
    # The longest first, in their given order where they are equal.
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for sample in longest_first:
        length = lengths[sample]
        if length > max_length:
            raise ValueError(
                f"a sample of {length} tokens does not fit in a row of {max_length}; "
                "truncate it first"
            )
        # The fullest row that still has room; the earliest of several equally full ones.
        place = bisect.bisect_left(free, (length, 0))
        if place == len(free):
            left = max_length
            row = len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(sample)
        bisect.insort(free, (left - length, row))
    return rows


def cut(lengths: Sequence[int], max_length: int, *, prompt: int = 0) -> list[list[Piece]]:
    """Cuts documents, one behind the other, into rows of `max_length` tokens; the last is shorter.

    A document that is cut goes on in the next row.

    Args:
      lengths: tokens of each document.
      max_length: tokens of a row.
      prompt: tokens of a soft prompt, which stands before each piece.

    Returns:
      The pieces of documents in each row.
    """
    rows: list[list[Piece]] = []
    room = 0  # tokens that the last row still takes
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            # A piece has at least one token behind the prompt.
            if room <= prompt:
                rows.append([])
                room = max_length
            stop = min(start + room - prompt, length)
            rows[-1].append(Piece(document, start, stop))
            room -= prompt + stop - start
            start = stop
    return rows


def collate(rows: Sequence[Sequence[Sample]], max_length: int) -> Batch:
    """Builds a batch from rows of samples, each padded to `max_length`; a row may be empty.

    Returns arrays [B, T]:
      tokens: int32, 0 in padding.
      targets: int32, the next token of the same sample; 0 at a sample's last token and in padding.
      weights: float32, 1 where the target is a label that counts in the loss, else 0.
      positions: int32, from 0 in each sample.
      segment_ids: int32, 1, 2, ... for the samples of a row, 0 in padding.

    Raises:
      ValueError: a row is longer than `max_length`.
    """
    shape = (len(rows), max_length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for b, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, 1):  # segment 0 is padding
            stop = start + len(sample)
            if stop > max_length:
                raise ValueError(
                    f"a row of {sum(map(len, row))} tokens is longer than {max_length}; "
                    "pack or truncate it first"
                )
            batch["tokens"][b, start:stop] = sample.tokens
            # The last token of a sample has no target: the next one belongs to another sample.
            last = max(stop - 1, start)  # a sample may be empty
            batch["targets"][b, start:last] = sample.tokens[1:]
            batch["weights"][b, start:last] = sample.mask[1:]
            batch["positions"][b, start:stop] = np.arange(len(sample))
            batch["segment_ids"][b, start:stop] = segment
            start = stop
    return batch
