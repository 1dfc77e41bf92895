"""Makes batches that depend on the step alone, so that resuming a run needs only its step.

Letters: B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import Batch, collate

Sets = tuple[tuple[int, float], ...]
"""The sets that are mixed, in the order of their rows: number of rows, and passes in an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Training batches as a pure function of the step."""

    rows: Sequence[Sequence[Sample]]
    batch_size: int
    max_length: int
    seed: int
    sets: Sets = ()
    """How the rows are mixed; empty takes each row once in an epoch."""

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(_rows_in_epoch(count, weight) for count, weight in self._sets)

    @property
    def steps_per_epoch(self) -> float:
        """Steps per epoch; a fraction if a batch spans the end of an epoch."""
        return len(self) / self.batch_size

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0; see `indices`."""
        rows = [self.rows[i] for i in self.indices(step)]
        return collate(rows, self.max_length)

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the rows in the batch of a step.

        The epochs, each shuffled by the seed and its number, form one endless stream of rows.
        Batches are consecutive slices of that stream.
        """
        n = len(self)
        first = step * self.batch_size
        chosen = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, n)
            order = _epoch(self._sets, self.seed, epoch)
            chosen.append(int(order[place]))
        return chosen

    @property
    def _sets(self) -> Sets:
        return self.sets or ((len(self.rows), 1.0),)


def evaluation_batches(
    rows: Sequence[Sequence[Sample]],
    batch_size: int,
    *,
    max_length: int,
    limit: int = 0,
) -> Iterator[Batch]:
    """Yields the first `limit` rows (0 means all) as batches, in order.

    The last batch is filled up with empty rows, so that all batches have one shape and the
    evaluation step compiles once.
    """
    stop = len(rows)
    if limit:
        stop = min(limit, stop)
    for start in range(0, stop, batch_size):
        end = min(start + batch_size, stop)
        chosen = list(rows[start:end])
        missing = batch_size - len(chosen)
        empty: list[Sample] = []
        yield collate([*chosen, *[empty] * missing], max_length)


def _rows_in_epoch(count: int, weight: float) -> int:
    """How many rows of a set an epoch has."""
    if count == 0:
        return 0
    rows = round(count * weight)
    # A set with a small weight still takes part.
    return max(rows, 1)


# Two entries, because a batch may span the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=2)
def _epoch(sets: Sets, seed: int, epoch: int) -> np.ndarray:
    """Returns the indices of the rows of an epoch, in its order."""
    parts = []
    first = 0  # index of the set's first row
    for number, (count, weight) in enumerate(sets):
        part = _part(count, weight, (seed, number), epoch)
        parts.append(first + part)
        first += count
    rows = np.concatenate(parts)
    # Seeding by the epoch makes any epoch's order available without those before it.
    order = _shuffled(len(rows), (seed, epoch))
    return rows[order]


def _part(count: int, weight: float, key: tuple[int, int], epoch: int) -> np.ndarray:
    """Returns which rows of a set an epoch has.

    The set is one endless stream of shuffled passes, and each epoch takes the next part of it. So
    two epochs of half a set see each row once.
    """
    if weight == 1:
        return np.arange(count)
    size = _rows_in_epoch(count, weight)
    if size == 0:
        return np.arange(0)
    # The places of the part in the stream, and the passes that it touches.
    start = epoch * size
    last = start + size - 1
    first_pass = start // count
    last_pass = last // count
    orders = []
    for each in range(first_pass, last_pass + 1):
        # Three numbers, so that this shuffles otherwise than the order of any epoch.
        orders.append(_shuffled(count, (*key, each)))
    stream = np.concatenate(orders)
    skipped = start - first_pass * count
    return stream[skipped : skipped + size]


def _shuffled(count: int, seed: tuple[int, ...]) -> np.ndarray:
    """The numbers below `count`, in an order that depends on the seed alone."""
    generator = np.random.default_rng(seed)
    return generator.permutation(count)
