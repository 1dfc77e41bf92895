"""Loads the data of a run: from the sources in its config to rows of samples on disk."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorax_ft.config import DataConfig
from lorax_ft.data.batches import Sets
from lorax_ft.data.chat import Encoder, Tokenizer
from lorax_ft.data.conversation import Conversation, Example, PlainText
from lorax_ft.data.formats import Defaults, to_example
from lorax_ft.data.packing import cut, pack
from lorax_ft.data.readers import Row
from lorax_ft.data.shapes import Shape, detect_shape, fitting_shape
from lorax_ft.data.sources import has_split, parse_sources, read_rows
from lorax_ft.data.store import Piece, StoredRows, StoredSamples, store_rows, store_samples
from lorax_ft.data.tools import read_tools
from lorax_ft.data.usage import optional_fields, unknown_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the validation split of a dataset."""

    rows: StoredRows
    """What the model sees: one sample per row, or several if they are packed."""
    sets: Sets
    """How the rows of several sets are mixed."""
    count: int
    """Examples that were read, including dropped ones."""
    cut: int
    """Examples truncated to `max_length`."""
    dropped: int
    """Examples without a label, usually because it was truncated; they are in no row."""
    usual_length: int
    """Length in tokens that 95 % of the examples do not exceed."""
    tokens: int
    """Tokens in all rows, without padding."""
    labels: int
    """Tokens that count in the loss, over all rows."""
    examples: list[Example]
    """The examples themselves, of the validation split only: its questions are answered."""
    unused: Mapping[str, int]
    """What the data has and the model never sees, with the number of rows or messages."""
    endless: int
    """Trained turns that end without an end-of-turn token: the model would not learn to stop."""


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

    @property
    def validation(self) -> Split:
        """The first validation set, whose loss picks the best checkpoint."""
        return next(iter(self.validation_sets.values()))


@dataclasses.dataclass(kw_only=True)
class _Seen:
    """What is noted of the examples while they are read; they are not kept in memory."""

    sets: array[int] = dataclasses.field(default_factory=lambda: array("l"))
    """The number of each example's set."""
    documents: array[int] = dataclasses.field(default_factory=lambda: array("b"))
    """Whether each example is a text without a prompt."""
    empty: int = 0
    """Texts that are empty."""
    unused: Counter[str] = dataclasses.field(default_factory=Counter)
    """Columns that no example contains."""
    fields: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """What conversations have that not every template reads (`optional_fields`)."""
    examples: list[Example] | None = None
    """The examples, if they are kept."""


@dataclasses.dataclass(frozen=True)
class _Read:
    """A split that is read and tokenized; how long its rows become is not yet known."""

    samples: StoredSamples
    seen: _Seen
    endless: int
    unused: Mapping[str, int]


NumberedRows = Iterable[tuple[int, Row]]
"""Rows, each with the number of its set."""


def load_data(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, positions: int | None = None
) -> Dataset:
    """Reads, converts and tokenizes the data of a run, a part at a time.

    Without validation files, the validation rows come from the validation split of the training
    folder if it has one; otherwise they are held out of the training rows by the seed.

    Args:
      config: the data.
      tokenizer: the model's.
      seed: of the choice of held-out rows.
      positions: the longest sample that the model takes, for `max_length` auto; None: any length.

    Raises:
      ValueError: a source or a row cannot be used (see `read_rows`, `to_example`, `encode`),
        or no sample keeps a label.
    """
    held_out: list[tuple[int, Row]] = []
    chosen: set[int] = set()
    validation: dict[str, NumberedRows] = {"": held_out}
    if config.validation:
        validation = {}
        for name, paths in name_sets(config.validation).items():
            validation[name] = _rows(paths, config.validation_split, config)
    elif _has_validation_split(config):
        validation = {"": _rows(_paths(config), config.validation_split, config)}
    elif config.validation_rows:
        chosen = _choose_held_out(config, seed)
    rows = _rows(_paths(config), config.split, config, limit=config.limit)
    # The rows that are held out are collected while the others are read.
    train = _read(_without(rows, chosen, held_out), config, tokenizer)
    validation_sets = {}
    for name, its_rows in validation.items():
        validation_sets[name] = _read(its_rows, config, tokenizer, keep=True)
    max_length = config.max_length
    if max_length == "auto":
        max_length = _row_length([train, *validation_sets.values()], positions)
    weights = [source.weight for source in parse_sources(config.train)]
    return Dataset(
        train=_make_split(train, max_length, weights=weights, packed=config.pack),
        validation_sets={
            name: _make_split(read, max_length, weights=(), packed=False)
            for name, read in validation_sets.items()
        },
        max_length=max_length,
    )


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
    """Converts the first row of each source, to find mistakes before the model is loaded.

    Raises:
      ValueError: as `read_rows` and `to_example`.
    """
    splits = [(path, config.split) for path in _paths(config)]
    for paths in name_sets(config.validation).values():
        splits += [(path, config.validation_split) for path in paths]
    for path, split in splits:
        first = itertools.islice(_rows([path], split, config), 1)
        for _ in _examples(first, config, _Seen()):
            pass


def _paths(config: DataConfig) -> list[str]:
    return [source.path for source in parse_sources(config.train)]


def _rows(
    paths: Sequence[str], split: str, config: DataConfig, *, limit: int | None = None
) -> Iterator[tuple[int, Row]]:
    """Yields the rows of all sources, each with its source's number."""

    def numbered() -> Iterator[tuple[int, Row]]:
        for number, path in enumerate(paths):
            for row in read_rows([path], split=split, revision=config.revision):
                yield number, row

    return itertools.islice(numbered(), limit)


def _has_validation_split(config: DataConfig) -> bool:
    """Whether the training data is one folder that also has a file of the validation split."""
    paths = _paths(config)
    if config.validation_rows == 0 or len(paths) != 1:
        return False
    return has_split(paths[0], config.validation_split)


def _choose_held_out(config: DataConfig, seed: int) -> set[int]:
    """Chooses the training rows that become the validation rows, by their numbers."""
    # A reading of its own: which rows are chosen depends on how many there are.
    total = sum(1 for _ in _rows(_paths(config), config.split, config, limit=config.limit))
    # A small dataset keeps nine tenths of its rows for training.
    count = min(config.validation_rows, total // 10)
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


def _read(
    rows: NumberedRows, config: DataConfig, tokenizer: Tokenizer, *, keep: bool = False
) -> _Read:
    """Converts and tokenizes the rows of a split; `keep` keeps the examples."""
    seen = _Seen(examples=[] if keep else None)
    encoder = Encoder(
        tokenizer,
        loss_on=config.loss_on,
        reasoning_loss=config.reasoning_loss,
        append_end=config.append_end,
    )
    samples = store_samples(encoder.samples(_examples(rows, config, seen)))
    return _Read(samples, seen, encoder.endless, _unused(seen, encoder, tokenizer))


def _row_length(splits: Sequence[_Read], positions: int | None) -> int:
    """The length of rows that hold the longest sample: a multiple of 32, of 128 above 1024."""
    longest = max(int(read.samples.lengths.max(initial=1)) for read in splits)
    multiple = 32 if longest <= 1024 else 128
    length = math.ceil(longest / multiple) * multiple
    return length if positions is None else min(length, positions)


def _make_split(read: _Read, max_length: int, *, weights: Sequence[float], packed: bool) -> Split:
    """Cuts and packs the samples of a split into rows."""
    samples, seen = read.samples, read.seen
    documents = np.array(seen.documents, np.bool_) & packed
    numbers = np.array(seen.sets, np.int64)
    if all(weight == 1 for weight in weights):
        # Rows that are mixed evenly may share a row of the model.
        numbers[:] = 0
        weights = (1.0,)
    made: list[list[Piece]] = []
    sets = []
    for number, weight in enumerate(weights):
        ours = _make_rows(samples, numbers == number, documents, max_length, packed=packed)
        made.extend(ours)
        sets.append((len(ours), weight))
    if len(samples) and not made:
        raise ValueError(
            f"none of the {len(samples)} samples keeps a label within {max_length} tokens; "
            "raise data.max_length"
        )
    pieces = list(itertools.chain.from_iterable(made))
    lengths, count = samples.lengths, len(samples) + seen.empty
    return Split(
        rows=store_rows(samples, made),
        sets=tuple(sets),
        count=count,
        cut=int((lengths[~documents] > max_length).sum()),
        dropped=count - len({piece.sample for piece in pieces}),
        usual_length=int(np.quantile(lengths, 0.95, method="higher")) if len(lengths) else 0,
        tokens=sum(piece.stop - piece.start for piece in pieces),
        labels=sum(map(samples.labels, pieces)),
        examples=seen.examples or [],
        unused=read.unused,
        endless=read.endless,
    )


def _make_rows(
    samples: StoredSamples,
    ours: np.ndarray,
    documents: np.ndarray,
    max_length: int,
    *,
    packed: bool,
) -> list[list[Piece]]:
    """Makes the rows of a set: `ours` and `documents` tell which samples are of it and are cut."""
    lengths = samples.lengths
    whole = []
    for sample in np.flatnonzero(ours & ~documents).tolist():
        piece = Piece(sample, 0, min(int(lengths[sample]), max_length))
        if samples.labels(piece):
            whole.append(piece)
    rows = [[piece] for piece in whole]
    if packed:
        packs = pack([piece.stop for piece in whole], max_length)
        rows = [[whole[i] for i in row] for row in packs]
    # Documents are cut across rows, so none of their text is lost.
    texts = np.flatnonzero(ours & documents)
    for row in cut(lengths[texts].tolist(), max_length):
        pieces = [Piece(int(texts[piece.sample]), piece.start, piece.stop) for piece in row]
        if any(map(samples.labels, pieces)):
            rows.append(pieces)
    return rows


def _examples(rows: NumberedRows, config: DataConfig, seen: _Seen) -> Iterator[tuple[Example, str]]:
    """Yields the examples that rows become, each with its place."""
    defaults = _defaults(config)
    usual_shapes: dict[int, Shape] = {}
    for number, row in rows:
        if config.shape != "auto":
            shape: Shape = config.shape
        elif number not in usual_shapes:
            # The rows of a set are expected to have the format of its first one.
            shape = usual_shapes[number] = detect_shape(row, fields=config.fields)
        else:
            shape = fitting_shape(row, usual=usual_shapes[number], fields=config.fields)
        example = to_example(
            row, shape=shape, fields=config.fields, defaults=defaults, unused=seen.unused
        )
        # Text corpora have empty lines; they would teach the model to end at once.
        if isinstance(example, PlainText) and not example.completion.strip():
            seen.empty += 1
            continue
        seen.sets.append(number)
        seen.documents.append(isinstance(example, PlainText) and not example.prompt)
        if isinstance(example, Conversation):
            seen.fields.update(optional_fields(example))
        if seen.examples is not None:
            seen.examples.append(example)
        yield example, row.where


def _unused(seen: _Seen, encoder: Encoder, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns what the model never sees, with how often it occurs."""
    unused = {**seen.unused, **unknown_fields(seen.fields, tokenizer)}
    for text, count in encoder.unwritten.items():
        unused[f"{text} (not written by the chat template)"] = count
    return unused


def _defaults(config: DataConfig) -> Defaults:
    """What the options give to conversations that have none of their own."""
    tools = None
    if config.tools is not None:
        tools = read_tools(config.tools, "data.tools")
    return Defaults(system=config.system, tools=tools, template_args=config.parsed_template_args())
