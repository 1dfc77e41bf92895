"""Keeps the samples of a run on disk, so that the data may be larger than memory.

The files have no name and disappear with the process. What was read lately stays in the page cache
of the operating system, so small data sets are read at the speed of memory.
"""

from __future__ import annotations

import dataclasses
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple, overload

import numpy as np

from lorax_ft.data.chat import Sample
from lorax_ft.files import named_errors

NO_PROMPT = np.zeros(0, np.int32)


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a stored sample."""

    sample: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSamples:
    """Samples one behind the other, whole, whatever their lengths."""

    tokens: np.ndarray
    """Token ids of all samples, int32."""
    mask: np.ndarray
    """Whether they count as labels, bool."""
    borders: np.ndarray
    """Where each sample starts, and where the last one ends, int64 [samples + 1]."""
    prompt: np.ndarray
    """The virtual tokens of a soft prompt, which are read in front of each piece, int32."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample without the soft prompt, int64 [samples]."""
        return np.diff(self.borders)

    def read(self, piece: Piece) -> Sample:
        """Returns a piece of a sample, with the soft prompt before it."""
        first = int(self.borders[piece.sample])
        place = slice(first + piece.start, first + piece.stop)
        tokens = np.asarray(self.tokens[place])
        mask = np.asarray(self.mask[place])
        if len(self.prompt):
            tokens = np.concatenate([self.prompt, tokens])
            mask = np.concatenate([np.zeros(len(self.prompt), np.bool_), mask])
        return Sample(tokens, mask)

    def labels(self, piece: Piece) -> int:
        """Returns how many tokens of a piece count in the loss."""
        # The first token, unless a soft prompt is before it, is never a target.
        return int(self.read(piece).mask[1:].sum())


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRows(Sequence[list[Sample]]):
    """Rows for the model, each a list of samples or of their pieces, read when they are needed."""

    samples: StoredSamples
    pieces: np.ndarray
    """The pieces of all rows, int64 [pieces, 3], with the columns of `Piece`."""
    borders: np.ndarray
    """Where each row starts in `pieces`, and where the last one ends, int64 [rows + 1]."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    @overload
    def __getitem__(self, index: int) -> list[Sample]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Sample]]: ...
    def __getitem__(self, index: int | slice) -> list[Sample] | list[list[Sample]]:
        count = len(self)
        if isinstance(index, slice):
            places = range(*index.indices(count))
            return [self[i] for i in places]
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        row = index % count  # a negative index counts from the end
        first = self.borders[row]
        stop = self.borders[row + 1]
        samples = []
        for numbers in self.pieces[first:stop]:
            piece = Piece(*map(int, numbers))
            samples.append(self.samples.read(piece))
        return samples


def store_samples(samples: Iterable[Sample], *, prompt: np.ndarray = NO_PROMPT) -> StoredSamples:
    """Writes samples to temporary files, in the folder that `TMPDIR` names, and maps them.

    Args:
      samples: without a soft prompt.
      prompt: its virtual tokens.

    Raises:
      OSError: that folder has no room, or cannot be written.
    """
    borders = array("q", [0])
    with (
        named_errors(f"the temporary folder {tempfile.gettempdir()} (TMPDIR names another one)"),
        tempfile.TemporaryFile() as tokens,
        tempfile.TemporaryFile() as mask,
    ):
        for sample in samples:
            sample_tokens = np.asarray(sample.tokens, np.int32)
            sample_mask = np.asarray(sample.mask, np.bool_)
            tokens.write(sample_tokens.tobytes())
            mask.write(sample_mask.tobytes())
            borders.append(borders[-1] + len(sample))
        return StoredSamples(
            tokens=_mapped(tokens, np.int32),
            mask=_mapped(mask, np.bool_),
            borders=np.array(borders, np.int64),
            prompt=prompt,
        )


def store_rows(samples: StoredSamples, rows: Iterable[Sequence[Piece]]) -> StoredRows:
    """Returns the rows that these pieces make up."""
    # Arrays of 8 bytes a number, as there may be millions of pieces.
    pieces = array("q")
    borders = array("q", [0])
    for row in rows:
        for piece in row:
            pieces.extend(piece)
        borders.append(borders[-1] + len(row))
    return StoredRows(
        samples=samples,
        pieces=np.array(pieces, np.int64).reshape(-1, 3),
        borders=np.array(borders, np.int64),
    )


def _mapped(file: IO[bytes], dtype: type[np.generic]) -> np.ndarray:
    """Maps a file into memory; the mapping outlives the file's closing."""
    file.flush()
    if file.tell() == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")
