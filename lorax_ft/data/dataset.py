"""The data of a run: from the sources in its config to rows of samples on disk."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorax_ft.config import DataConfig
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.chat import Tokenizer
from lorax_ft.data.examples import NumberedRows, Seen, examples_of, numbered_rows
from lorax_ft.data.rows import Row
from lorax_ft.data.sources import has_split, parse_sources, split_limit
from lorax_ft.data.splits import Split, make_split, read_split, row_length
from lorax_ft.data.store import NO_PROMPT

BLOCK = 128
"""Tokens; kernels of attention compute rows in blocks of so many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The splits of a run's data.

    Validation rows are never packed, so each of them is one example.
    """

    train: Split
    validation_sets: Mapping[str, Split]
    """The validation sets by name, at least one; "" is the name of the one without a name."""
    max_length: int
    """Tokens per row: data.max_length, or what auto has found."""
    bad_rows: BadRows
    """Rows that were left out (data.bad_rows), in all splits."""

    @property
    def validation(self) -> Split:
        """The first validation set, whose loss picks the best checkpoint."""
        return next(iter(self.validation_sets.values()))


def load_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    positions: int | None = None,
    prompt: np.ndarray = NO_PROMPT,
    blocks: int = BLOCK,
) -> Dataset:
    """Reads, converts and tokenizes the data of a run, a part at a time.

    Without validation files, the validation rows come from the validation split of the training
    folder if it has one; otherwise they are held out of the training rows by the seed.

    Args:
      config: the data.
      tokenizer: the model's.
      seed: of the choice of held-out rows.
      positions: the longest sample that the model takes, for `max_length` auto; None: any length.
      prompt: the virtual tokens of a soft prompt (`virtual_ids`), which stand before each sample
        and take their part of a row.
      blocks: rows that are shorter than `max_length`, as no sample is so long, have a multiple of
        so many tokens.

    Raises:
      ValueError: a source or a row cannot be used (see `read_rows`, `to_example`, `encode`),
        or no sample keeps a label.
    """
    bad = _bad_rows(config)
    held_out: list[tuple[int, Row]] = []
    chosen: set[int] = set()
    validation: dict[str, NumberedRows] = {"": held_out}
    if config.validation:
        validation = {}
        for name, paths in name_sets(config.validation).items():
            validation[name] = numbered_rows(paths, config.validation_split, config, bad=bad)
    elif _has_validation_split(config):
        paths = [split_limit(path)[0] for path in _paths(config)]
        validation = {"": numbered_rows(paths, config.validation_split, config, bad=bad)}
    elif config.validation_rows:
        chosen = _choose_held_out(config, seed)
    rows = numbered_rows(_paths(config), config.split, config, limit=config.limit, bad=bad)
    # The rows that are held out are collected while the others are read.
    train = read_split(_without(rows, chosen, held_out), config, tokenizer, bad, prompt=prompt)
    validation_sets = {}
    for name, its_rows in validation.items():
        validation_sets[name] = read_split(
            its_rows, config, tokenizer, bad, keep=True, prompt=prompt
        )
    longest = row_length([train, *validation_sets.values()], positions)
    max_length = _tokens_of_rows(config, longest, blocks)
    weights = [source.weight for source in parse_sources(config.train)]
    return Dataset(
        train=make_split(train, max_length, weights=weights, packed=config.pack),
        validation_sets={
            name: make_split(read, max_length, weights=(), packed=False)
            for name, read in validation_sets.items()
        },
        max_length=max_length,
        bad_rows=bad,
    )


def _tokens_of_rows(config: DataConfig, longest: int, blocks: int) -> int:
    """The tokens of a row, where rows of `longest` tokens hold every sample."""
    if config.max_length == "auto":
        return longest
    if config.pack:
        return config.max_length
    # Nobody pays for padding that no sample needs.
    return min(config.max_length, math.ceil(longest / blocks) * blocks)


def load_split(
    config: DataConfig,
    path: str,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    positions: int | None = None,
) -> tuple[Split, int]:
    """Reads, converts and tokenizes one source, one example a row.

    Args:
      config: how rows are read; its own sources are not.
      path: the source, as in data.train.
      tokenizer: the model's.
      limit: rows to read; None reads all.
      positions: the longest sample that the model takes, for `max_length` auto; None: any length.

    Returns:
      The split, and the tokens of a row.

    Raises:
      ValueError: as `load_data`.
    """
    bad = _bad_rows(config)
    rows = numbered_rows([path], config.split, config, limit=limit, bad=bad)
    read = read_split(rows, config, tokenizer, bad, keep=True)
    max_length = config.max_length
    if max_length == "auto":
        max_length = row_length([read], positions)
    return make_split(read, max_length, weights=(), packed=False), max_length


def depends_on_seed(config: DataConfig) -> bool:
    """Whether `load_data` holds out rows by its seed, so that another seed trains on others."""
    return (
        not config.validation and config.validation_rows > 0 and not _has_validation_split(config)
    )


def name_sets(entries: Sequence[str]) -> dict[str, list[str]]:
    """The paths of each validation set, from entries "path" or "name=path", in their order.

    Entries of the same name are one set. A path that contains "=" and exists is a path.

    Raises:
      ValueError: an entry has the weight of a training source.
    """
    sets: dict[str, list[str]] = {}
    for entry in entries:
        named = re.fullmatch(r"([\w.-]+)=(.+)", entry)
        if named is None or Path(entry).exists():
            sets.setdefault("", []).append(entry)
        elif re.fullmatch(r"\d*\.?\d+", named[2]) and not Path(named[2]).exists():
            raise ValueError(
                f"data.validation has {entry}, but only data.train has weights; give {named[1]}"
            )
        else:
            sets.setdefault(named[1], []).append(named[2])
    return sets


def check_sources(config: DataConfig) -> None:
    """Converts the first row of each source, to find mistakes before the model is loaded.

    Where rows that cannot be used are left out, that is the first one that can be.

    Raises:
      ValueError: as `read_rows` and `to_example`.
    """
    splits = [(path, config.split) for path in _paths(config)]
    for paths in name_sets(config.validation).values():
        splits += [(path, config.validation_split) for path in paths]
    for path, split in splits:
        bad = _bad_rows(config)
        rows = numbered_rows([path], split, config, bad=bad)
        for _ in examples_of(rows, config, Seen(bad=bad)):
            break


def _bad_rows(config: DataConfig) -> BadRows:
    return BadRows(skip=config.bad_rows == "skip")


def _paths(config: DataConfig) -> list[str]:
    return [source.path for source in parse_sources(config.train)]


def _has_validation_split(config: DataConfig) -> bool:
    """Whether the training data is one folder that also has a file of the validation split."""
    paths = _paths(config)
    if config.validation_rows == 0 or len(paths) != 1:
        return False
    return has_split(paths[0], config.validation_split)


def _choose_held_out(config: DataConfig, seed: int) -> set[int]:
    """Chooses the training rows that become the validation rows, by their numbers."""
    # A reading of its own: which rows are chosen depends on how many there are.
    bad = _bad_rows(config)
    rows = numbered_rows(_paths(config), config.split, config, limit=config.limit, bad=bad)
    total = sum(1 for _ in rows)
    if config.validation_rows < 1:
        count = math.ceil(config.validation_rows * total)
        if 0 < total <= count:
            raise ValueError(
                f"data.validation_rows is {config.validation_rows}, which leaves none of the "
                f"{total} rows to train on; lower it"
            )
    else:
        # A small dataset keeps nine tenths of its rows for training.
        count = min(int(config.validation_rows), total // 10)
    return set(np.random.default_rng(seed).permutation(total)[:count].tolist())


def _without(
    rows: NumberedRows, chosen: set[int], held_out: list[tuple[int, Row]]
) -> Iterator[tuple[int, Row]]:
    """Yields the rows that are not chosen, and puts the chosen ones into `held_out`."""
    for i, row in enumerate(rows):
        if i in chosen:
            held_out.append(row)
        else:
            yield row
