"""Rows of several samples, and the arrays that keep each sample blind to the others.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from lorax_ft.data.chat import Sample

Batch = dict[str, np.ndarray]
"""Arrays [B, T], as `collate` makes them."""


def pack(samples: Sequence[Sample], max_length: int) -> list[list[Sample]]:
    """Samples in rows of at most `max_length` tokens, by best fit in decreasing length; no sample is split.

    Raises:
      ValueError: a sample is longer than a row.
    """
    rows: list[list[Sample]] = []
    free: list[tuple[int, int]] = []  # (tokens left, index) of each row, in order
    for sample in sorted(samples, key=len, reverse=True):
        if len(sample) > max_length:
            raise ValueError(
                f"a sample of {len(sample)} tokens does not fit a row of {max_length}; cut it first"
            )
        place = bisect.bisect_left(free, (len(sample), 0))
        if place == len(free):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(sample)
        bisect.insort(free, (left - len(sample), row))
    return rows


def collate(rows: Sequence[Sequence[Sample]], max_length: int) -> Batch:
    """The batch of some rows, each padded to `max_length`; a row may be empty.

    Returns arrays [B, T]:
      tokens: int32, 0 in padding.
      targets: int32, the next token of the same sample; 0 at a sample's last token and in padding.
      weights: float32, 1 where the target is a label that counts, else 0.
      positions: int32, from 0 in each sample.
      segment_ids: int32, 1, 2, ... for the samples of a row, 0 in padding.

    Raises:
      ValueError: a row is longer than `max_length`.
    """
    shape = (len(rows), max_length)
    names = ("tokens", "targets", "weights", "positions", "segment_ids")
    batch = {name: np.zeros(shape, np.float32 if name == "weights" else np.int32) for name in names}
    for b, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, 1):
            stop = start + len(sample)
            if stop > max_length:
                raise ValueError(
                    f"a row of {sum(map(len, row))} tokens is longer than {max_length}; pack or cut it first"
                )
            batch["tokens"][b, start:stop] = sample.tokens
            batch["targets"][b, start : stop - 1] = sample.tokens[1:]
            batch["weights"][b, start : stop - 1] = sample.mask[1:]
            batch["positions"][b, start:stop] = np.arange(len(sample))
            batch["segment_ids"][b, start:stop] = segment
            start = stop
    return batch
