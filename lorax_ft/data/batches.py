"""Loads a run's samples from its config, and makes batches that depend on the step alone.

Letters: B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    """The splits of a run's data.

    Validation rows are never packed, so each of them is one conversation.
    """

    train: Split
    validation_sets: Mapping[str, Split]
    """The validation sets by name, at least one; "" is the name of the one without a name."""
    max_length: int
    """Tokens per row: data.max_length, or what auto has found."""

    @property
    def validation(self) -> Split:
        """The first validation set, whose loss picks the best checkpoint."""
        return next(iter(self.validation_sets.values()))


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


def load_data(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, positions: int | None = None
) -> Dataset:
    """Reads, converts and tokenizes the data of a run.

    Without validation files, the validation rows come from the validation split of the training
    folder if it has one; otherwise they are held out of the training rows by the seed.

    Args:
      config: the data.
      tokenizer: the model's.
      seed: of the choice of held-out rows.
      positions: the longest sample that the model takes, for `max_length` auto; None: any length.

    Raises:
      ValueError: a source or a row cannot be used (see `read_rows`, `to_messages`, `encode_all`).
    """
    train = read_rows(
        config.train, split=config.split, limit=config.limit, revision=config.revision
    )
    if config.validation:
        validation = {}
        for name, paths in name_sets(config.validation).items():
            validation[name] = _read_validation(paths, config)
    elif _has_validation_split(config):
        validation = {"": _read_validation(config.train, config)}
    else:
        # A small dataset keeps nine tenths of its rows for training.
        count = min(config.validation_rows, len(train) // 10)
        train, held_out = _hold_out(train, count, seed)
        validation = {"": held_out}

    longest = config.max_length
    if longest == "auto":
        longest = sys.maxsize if positions is None else positions
    train_split = _prepare(train, config, tokenizer, max_length=longest)
    validation_sets = {
        name: _prepare(rows, config, tokenizer, max_length=longest)
        for name, rows in validation.items()
    }
    max_length = longest
    if config.max_length == "auto":
        max_length = _row_length([train_split, *validation_sets.values()], longest)
    if config.pack:
        samples = [sample for row in train_split.rows for sample in row]
        train_split = dataclasses.replace(train_split, rows=pack(samples, max_length))
    return Dataset(train=train_split, validation_sets=validation_sets, max_length=max_length)


def name_sets(entries: Sequence[str]) -> dict[str, list[str]]:
    """The paths of each validation set, from entries "path" or "name=path", in their order.

    Entries of the same name are one set. A path that contains "=" and exists is a path.
    """
    sets: dict[str, list[str]] = {}
    for entry in entries:
        named = re.fullmatch(r"([\w.-]+)=(.+)", entry)
        if named is None or Path(entry).exists():
            sets.setdefault("", []).append(entry)
        else:
            sets.setdefault(named[1], []).append(named[2])
    return sets


def check_sources(config: DataConfig) -> None:
    """Reads the first row of each split, to find a wrong path before the model is loaded.

    Raises:
      ValueError: as `read_rows`.
    """
    read_rows(config.train, split=config.split, limit=1, revision=config.revision)
    for paths in name_sets(config.validation).values():
        _read_validation(paths, config, limit=1)


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


def _row_length(splits: Sequence[Split], longest: int) -> int:
    """The length of rows that hold the longest sample: a multiple of 32, of 128 above 1024."""
    length = max(len(sample) for split in splits for row in split.rows for sample in row)
    multiple = 32 if length <= 1024 else 128
    return min(math.ceil(length / multiple) * multiple, longest)


def _prepare(
    rows: Sequence[Row], config: DataConfig, tokenizer: Tokenizer, *, max_length: int
) -> Split:
    """Converts and tokenizes the rows of a split, one sample in each row."""
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
        max_length=max_length,
        loss_on=config.loss_on,
        where=[row.where for row in rows],
    )
    return Split(
        rows=[[sample] for sample in encoded.samples],
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
