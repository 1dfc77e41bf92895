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
        return collate([self.rows[i] for i in self.indices(step)], self.max_length)

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
            chosen.append(int(_epoch(self._sets, self.seed, epoch)[place]))
        return chosen

    @property
    def _sets(self) -> Sets:
        return self.sets or ((len(self.rows), 1.0),)


def evaluation_batches(
    rows: Sequence[Sequence[Sample]], batch_size: int, *, max_length: int, limit: int = 0
) -> Iterator[Batch]:
    """Yields the first `limit` rows (0 means all) as batches, in order.

    The last batch is filled up with empty rows, so that all batches have one shape and the
    evaluation step compiles once.
    """
    stop = min(limit, len(rows)) if limit else len(rows)
    for start in range(0, stop, batch_size):
        chosen = list(rows[start : min(start + batch_size, stop)])
        padding: list[list[Sample]] = [[]] * (batch_size - len(chosen))
        yield collate([*chosen, *padding], max_length)


def _rows_in_epoch(count: int, weight: float) -> int:
    """How many rows of a set an epoch has."""
    if count == 0:
        return 0
    return max(round(count * weight), 1)


# Two entries, because a batch may span the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=2)
def _epoch(sets: Sets, seed: int, epoch: int) -> np.ndarray:
    """Returns the indices of the rows of an epoch, in its order."""
    parts = []
    first = 0
    for number, (count, weight) in enumerate(sets):
        parts.append(first + _part(count, weight, (seed, number), epoch))
        first += count
    rows = np.concatenate(parts)
    # Seeding by the epoch makes any epoch's order available without those before it.
    return rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]


def _part(count: int, weight: float, key: tuple[int, int], epoch: int) -> np.ndarray:
    """Returns which rows of a set an epoch has.

    The set is one endless stream of shuffled passes, and each epoch takes the next part of it. So
    two epochs of half a set see each row once.
    """
    if weight == 1:
        return np.arange(count)
    size = _rows_in_epoch(count, weight)
    start, stop = epoch * size, (epoch + 1) * size
    if size == 0:
        return np.arange(0)
    passes = range(start // count, (stop - 1) // count + 1)
    # Three numbers, so that this shuffles otherwise than the order of any epoch.
    orders = [np.random.default_rng((*key, each)).permutation(count) for each in passes]
    skipped = start - passes[0] * count
    return np.concatenate(orders)[skipped : skipped + size]
