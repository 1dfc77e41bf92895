"""The splits of a dataset: examples that are tokenized, then cut and packed into rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lorax_ft.config import DataConfig
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.batches import Sets
from lorax_ft.data.chat import Encoded, Encoder, Sample, Tokenizer
from lorax_ft.data.conversation import Example
from lorax_ft.data.examples import NumberedRows, Seen, examples_of
from lorax_ft.data.packing import cut, pack
from lorax_ft.data.parts import encode_parts
from lorax_ft.data.store import (
    NO_PROMPT,
    Piece,
    StoredRows,
    StoredSamples,
    store_rows,
    store_samples,
)
from lorax_ft.data.token_cache import TokenCache, cache_folder
from lorax_ft.data.usage import unknown_fields


@dataclasses.dataclass(frozen=True)
class ReadSplit:
    """A split that is read and tokenized; how long its rows become is not yet known."""

    samples: StoredSamples
    seen: Seen
    endless: int
    unused: Mapping[str, int]
    bad: int
    """Samples that are empty, as their examples could not be encoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the validation split of a dataset."""

    rows: StoredRows
    """What the model sees: one sample per row, or several if they are packed."""
    sets: Sets
    """How the rows of several sets are mixed."""
    count: int
    """Examples that were read, including dropped ones."""
    copies: int
    """Examples that are exactly equal to an earlier one; they are trained on as any other."""
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


def read_split(
    rows: NumberedRows,
    config: DataConfig,
    tokenizer: Tokenizer,
    bad: BadRows,
    *,
    keep: bool = False,
    prompt: np.ndarray = NO_PROMPT,
) -> ReadSplit:
    """Converts and tokenizes the rows of a split.

    Args:
      rows: the rows.
      config: how they are converted.
      tokenizer: the model's.
      bad: what happens to rows that cannot be used.
      keep: whether the examples are kept.
      prompt: the virtual tokens of a soft prompt, which stand before each sample.
    """
    seen = Seen(examples=[] if keep else None, bad=bad)
    encoder = Encoder(
        tokenizer=tokenizer,
        loss_on=config.loss_on,
        reasoning_loss=config.reasoning_loss,
        append_end=config.append_end,
        control_tokens=config.control_tokens,
        skip_bad=bad.skip,
    )
    endless = 0
    unwritten: Counter[str] = Counter()
    not_encoded: list[int] = []

    def samples() -> Iterator[Sample]:
        nonlocal endless
        first = 0
        for part in _encode(examples_of(rows, config, seen), encoder, config):
            endless += part.endless
            unwritten.update(part.unwritten)
            for index, problem in part.bad.items():
                not_encoded.append(first + index)
                bad.note(problem)
            first += len(part.lengths)
            yield from part.samples()

    stored = store_samples(samples(), prompt=prompt)
    if seen.examples is not None:
        for index in reversed(not_encoded):
            del seen.examples[index]
    unused = _unused(seen, unwritten, tokenizer)
    return ReadSplit(stored, seen, endless, unused, bad=len(not_encoded))


def _encode(
    examples: Iterator[tuple[Example, str]], encoder: Encoder, config: DataConfig
) -> Iterator[Encoded]:
    """Yields the encoded parts of a split, from the cache where they are kept."""
    folder = cache_folder(config.cache)
    cache = None if folder is None else TokenCache(folder, encoder)
    yield from encode_parts(examples, encoder, processes=config.num_proc, cache=cache)
    if cache is not None:
        cache.delete_old()


def row_length(splits: Sequence[ReadSplit], positions: int | None) -> int:
    """The length of rows that hold the longest sample: a multiple of 32, of 128 above 1024."""
    longest = max(
        int(read.samples.lengths.max(initial=1)) + len(read.samples.prompt) for read in splits
    )
    multiple = 32 if longest <= 1024 else 128
    length = math.ceil(longest / multiple) * multiple
    return length if positions is None else min(length, positions)


def make_split(
    read: ReadSplit, max_length: int, *, weights: Sequence[float], packed: bool
) -> Split:
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
    # As rows count them: behind the virtual tokens of a soft prompt.
    lengths = samples.lengths + len(samples.prompt)
    count = len(samples) - read.bad + seen.empty
    return Split(
        rows=store_rows(samples, made),
        sets=tuple(sets),
        count=count,
        copies=len(seen.hashes) - len(np.unique(np.frombuffer(seen.hashes, np.int64))),
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
    prompt = len(samples.prompt)
    whole = []
    for sample in np.flatnonzero(ours & ~documents).tolist():
        piece = Piece(sample, 0, min(int(lengths[sample]), max_length - prompt))
        if samples.labels(piece):
            whole.append(piece)
    rows = [[piece] for piece in whole]
    if packed:
        packs = pack([prompt + piece.stop for piece in whole], max_length)
        rows = [[whole[i] for i in row] for row in packs]
    # Documents are cut across rows, so none of their text is lost.
    texts = np.flatnonzero(ours & documents)
    for row in cut(lengths[texts].tolist(), max_length, prompt=prompt):
        pieces = [Piece(int(texts[piece.sample]), piece.start, piece.stop) for piece in row]
        if any(map(samples.labels, pieces)):
            rows.append(pieces)
    return rows


def _unused(seen: Seen, unwritten: Mapping[str, int], tokenizer: Tokenizer) -> dict[str, int]:
    """Returns what the model never sees, with how often it occurs."""
    unused = {**seen.unused, **unknown_fields(seen.fields, tokenizer)}
    for text, count in unwritten.items():
        unused[f"{text} (not written by the chat template)"] = count
    return unused
