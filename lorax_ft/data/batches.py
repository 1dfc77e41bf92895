"""Loads a run's samples from its config, and makes batches that depend on the step alone.

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
class Split:
    """The training or the validation split of a dataset."""

    rows: list[list[Sample]]
    """What the model sees: one sample per row, or several if they are packed."""
    conversations: list[list[Message]]
    """All conversations that were read, including dropped ones."""
    cut: int
    """Conversations truncated to `max_length`."""
    dropped: int
    """Conversations without a label, usually because it was truncated; they are in no row."""
    usual_length: int
    """Length in tokens that 95 % of the conversations do not exceed."""

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens in all rows, without padding."""
        return sum(len(sample) for row in self.rows for sample in row)

    @functools.cached_property
    def labels(self) -> int:
        """Tokens that count in the loss of one epoch."""
        # The first token of a sample is never a target: no token before it predicts it.
        return sum(int(sample.mask[1:].sum()) for row in self.rows for sample in row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Both splits of a run's data.

    Validation rows are never packed, so each of them is one conversation.
    """

    train: Split
    validation: Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Training batches as a pure function of the step, so resuming a run needs only its step."""

    rows: Sequence[Sequence[Sample]]
    batch_size: int
    max_length: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        """Steps per pass over the rows; a fraction if a batch spans the end of an epoch."""
        return len(self.rows) / self.batch_size

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0; see `indices`."""
        return collate([self.rows[i] for i in self.indices(step)], self.max_length)

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the rows in the batch of a step.

        The epochs, each shuffled by the seed and its number, form one endless stream of rows.
        Batches are consecutive slices of that stream.
        """
        n = len(self.rows)
        first = step * self.batch_size
        chosen = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, n)
            chosen.append(int(_shuffled(n, self.seed, epoch)[place]))
        return chosen


def evaluation_batches(
    rows: Sequence[Sequence[Sample]], batch_size: int, *, max_length: int, limit: int = 0
) -> Iterator[Batch]:
    """Yields the first `limit` rows (0 means all) as batches, in order.

    The last batch is filled up with empty rows, so that all batches have one shape and the
    evaluation step compiles once.
    """
    if limit:
        rows = rows[:limit]
    for start in range(0, len(rows), batch_size):
        chosen = list(rows[start : start + batch_size])
        padding: list[list[Sample]] = [[]] * (batch_size - len(chosen))
        yield collate([*chosen, *padding], max_length)


def load_data(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Dataset:
    """Reads, converts and tokenizes the data of a run.

    Without validation files, the validation rows come from the validation split of the training
    folder if it has one; otherwise they are held out of the training rows by the seed.

    Raises:
      ValueError: a source or a row cannot be used (see `read_rows`, `to_messages`, `encode_all`).
    """
    train = read_rows(
        config.train, split=config.split, limit=config.limit, revision=config.revision
    )
    if config.validation:
        validation = _read_validation(config.validation, config)
    elif _has_validation_split(config):
        validation = _read_validation(config.train, config)
    else:
        # A small dataset keeps nine tenths of its rows for training.
        count = min(config.validation_rows, len(train) // 10)
        train, validation = _hold_out(train, count, seed)
    return Dataset(
        train=_prepare(train, config, tokenizer, packed=config.pack),
        validation=_prepare(validation, config, tokenizer, packed=False),
    )


def check_sources(config: DataConfig) -> None:
    """Reads the first row of each split, to find a wrong path before the model is loaded.

    Raises:
      ValueError: as `read_rows`.
    """
    read_rows(config.train, split=config.split, limit=1, revision=config.revision)
    if config.validation:
        _read_validation(config.validation, config, limit=1)


def _read_validation(
    paths: Sequence[str], config: DataConfig, *, limit: int | None = None
) -> list[Row]:
    return read_rows(paths, split=config.validation_split, limit=limit, revision=config.revision)


def _has_validation_split(config: DataConfig) -> bool:
    """Whether the training data is one folder that also has a file of the validation split."""
    if config.validation_rows == 0 or len(config.train) != 1:
        return False
    folder = config.train[0]
    return Path(folder).is_dir() and find_split(folder, config.validation_split) is not None


def _hold_out(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into those to train on and `count` held-out ones, both in their old order."""
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    kept = []
    held_out = []
    for i, row in enumerate(rows):
        if i in chosen:
            held_out.append(row)
        else:
            kept.append(row)
    return kept, held_out


def _prepare(
    rows: Sequence[Row], config: DataConfig, tokenizer: Tokenizer, *, packed: bool
) -> Split:
    """Converts, tokenizes and packs the rows of a split."""
    if not rows:
        return Split(rows=[], conversations=[], cut=0, dropped=0, usual_length=0)
    shape = config.shape
    if shape == "auto":
        # All rows of a dataset are expected to have the format of the first one.
        shape = detect_shape(rows[0], fields=config.fields)
    conversations = []
    for row in rows:
        messages = to_messages(row, shape=shape, fields=config.fields, system=config.system)
        conversations.append(messages)
    encoded = encode_all(
        conversations,
        tokenizer,
        max_length=config.max_length,
        loss_on=config.loss_on,
        where=[row.where for row in rows],
    )
    if packed:
        sample_rows = pack(encoded.samples, config.max_length)
    else:
        sample_rows = [[sample] for sample in encoded.samples]
    return Split(
        rows=sample_rows,
        conversations=conversations,
        cut=encoded.cut,
        dropped=encoded.dropped,
        usual_length=encoded.usual_length,
    )


# Two entries, because a batch may span the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the indices of n rows in the order of an epoch."""
    # Seeding by the epoch makes any epoch's order available without those before it.
    return np.random.default_rng((seed, epoch)).permutation(n)
