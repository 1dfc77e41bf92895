"""The data of a run: samples from its config, and batches that depend on the step alone.

Letters: B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lorax_ft.config import DataConfig
from lorax_ft.data.chat import Sample, Tokenizer, encode_all
from lorax_ft.data.formats import Message, detect_shape, to_messages
from lorax_ft.data.packing import Batch, collate, pack
from lorax_ft.data.sources import Row, find_split, read_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The training or the validation part of a data set."""

    rows: list[list[Sample]]
    """What the model sees: one sample a row, or several where they are packed."""
    conversations: list[list[Message]]
    """Every conversation that was read, those that were dropped too."""
    cut: int
    """Conversations cut to `max_length`."""
    dropped: int
    """Conversations left out because they have no label, mostly because it was cut away."""
    usual_length: int
    """Tokens that 95 % of the conversations fit into."""

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens in all rows, without padding."""
        return sum(len(sample) for row in self.rows for sample in row)

    @functools.cached_property
    def labels(self) -> int:
        """Tokens that count in the loss of one epoch."""
        return sum(int(sample.mask[1:].sum()) for row in self.rows for sample in row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The two parts of a run's data. Validation rows hold one sample each, so that a row is a question."""

    train: Part
    validation: Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Training batches as a pure function of the step, so that resuming needs no more than its number."""

    rows: Sequence[Sequence[Sample]]
    batch_size: int
    max_length: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in a pass over the rows; a batch may straddle two passes, so it need not be whole."""
        return len(self.rows) / self.batch_size

    def batch(self, step: int) -> Batch:
        """Batch number `step` from 0: that many rows on in the stream of one shuffled pass after the other."""
        return collate([self.rows[i] for i in self.indices(step)], self.max_length)

    def indices(self, step: int) -> list[int]:
        """Which rows batch number `step` holds."""
        first, n = step * self.batch_size, len(self.rows)
        places = (divmod(place, n) for place in range(first, first + self.batch_size))
        return [int(_order(n, self.seed, epoch)[i]) for epoch, i in places]


def evaluation_batches(
    rows: Sequence[Sequence[Sample]], batch_size: int, *, max_length: int, limit: int = 0
) -> Iterator[Batch]:
    """Batches of the first `limit` rows (0 takes all) in order; the last is filled up with empty rows."""
    rows = rows[:limit] if limit else rows
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield collate([*part, *[[]] * (batch_size - len(part))], max_length)


def load_data(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Dataset:
    """Reads, converts and tokenizes the data of a run.

    Where no validation files are given, a training folder's other split is taken, or rows are held out by the seed.

    Raises:
      ValueError: a source or a row cannot be used (see `read_rows`, `to_messages`, `encode_all`).
    """
    train = read_rows(
        config.train, split=config.split, limit=config.limit, revision=config.revision
    )
    beside = (
        len(config.train) == 1 and Path(config.train[0]).is_dir() and config.validation_rows > 0
    )
    if config.validation or (beside and find_split(config.train[0], config.validation_split)):
        sources = config.validation or config.train
        validation = read_rows(sources, split=config.validation_split, revision=config.revision)
    else:
        train, validation = _hold_out(train, min(config.validation_rows, len(train) // 10), seed)
    return Dataset(
        train=_prepare(train, config, tokenizer, packed=config.pack),
        validation=_prepare(validation, config, tokenizer, packed=False),
    )


def check_sources(config: DataConfig) -> None:
    """Reads the first row of each part of the data, before anything that takes long.

    Raises:
      ValueError: as `read_rows`.
    """
    read_rows(config.train, split=config.split, limit=1, revision=config.revision)
    if config.validation:
        read_rows(
            config.validation, split=config.validation_split, limit=1, revision=config.revision
        )


def _hold_out(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    held = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in held], [
        row for i, row in enumerate(rows) if i in held
    ]


def _prepare(
    rows: Sequence[Row], config: DataConfig, tokenizer: Tokenizer, *, packed: bool
) -> Part:
    if not rows:
        return Part(rows=[], conversations=[], cut=0, dropped=0, usual_length=0)
    shape = detect_shape(rows[0], fields=config.fields) if config.shape == "auto" else config.shape
    conversations = [
        to_messages(row, shape=shape, fields=config.fields, system=config.system) for row in rows
    ]
    encoded = encode_all(
        conversations,
        tokenizer,
        max_length=config.max_length,
        loss_on=config.loss_on,
        where=[row.where for row in rows],
    )
    packing = (
        pack(encoded.samples, config.max_length)
        if packed
        else [[sample] for sample in encoded.samples]
    )
    return Part(
        rows=packing,
        conversations=conversations,
        cut=encoded.cut,
        dropped=encoded.dropped,
        usual_length=encoded.usual_length,
    )


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)
