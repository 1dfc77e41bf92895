"""Packing, the store of samples, and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_ft.data.batches import Batches, evaluation_batches
from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import collate, cut, pack
from lorax_ft.data.store import Piece, store_rows, store_samples


def sample_of(length: int, label: bool = True) -> Sample:
    return Sample(np.arange(1, length + 1, dtype=np.int32), np.full(length, label))


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_sample_whole(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < tokens <= 20 for tokens in filled)
    # Else two of these rows would fit into one.
    assert sum(tokens <= 10 for tokens in filled) <= 1
    assert rows == pack(lengths, 20)


@given(st.lists(st.integers(0, 50), max_size=20))
def test_cutting_keeps_every_token_in_order(lengths: list[int]) -> None:
    rows = cut(lengths, 20)
    seen = [(p.sample, token) for row in rows for p in row for token in range(p.start, p.stop)]
    assert seen == [(i, token) for i, length in enumerate(lengths) for token in range(length)]
    filled = [sum(piece.stop - piece.start for piece in row) for row in rows]
    assert all(tokens == 20 for tokens in filled[:-1])
    assert all(0 < tokens <= 20 for tokens in filled)


def test_the_store_gives_back_what_was_written() -> None:
    samples = [sample_of(3), sample_of(0), sample_of(5, label=False)]
    store = store_samples(iter(samples))
    assert store.lengths.tolist() == [3, 0, 5]
    for i, sample in enumerate(samples):
        read = store.read(Piece(i, 0, len(sample)))
        np.testing.assert_array_equal(read.tokens, sample.tokens)
        np.testing.assert_array_equal(read.mask, sample.mask)
        assert (read.tokens.dtype, read.mask.dtype) == (np.int32, np.bool_)
    assert [store.labels(Piece(*piece)) for piece in ((0, 0, 3), (0, 1, 3), (2, 0, 5))] == [2, 1, 0]
    rows = store_rows(store, [[Piece(2, 1, 3), Piece(0, 0, 3)], [], [Piece(0, 2, 3)]])
    found = [[sample.tokens.tolist() for sample in row] for row in rows]
    assert found == [[[2, 3], [1, 2, 3]], [], [[3]]]
    assert [len(row) for row in rows[1:]] == [0, 1]
    assert len(store_rows(store_samples([]), [])) == 0
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4), min_size=1, max_size=4
    )
)
def test_batches_never_cross_samples(layout: list[list[tuple[int, bool]]]) -> None:
    rows = [[sample_of(length, label) for length, label in row] for row in layout]
    batch = collate(rows, 20)
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes == {n: np.float32 if n == "weights" else np.int32 for n in batch}
    assert batch["tokens"].shape[1] == 20
    for b, row in enumerate(rows):
        line = {name: array[b] for name, array in batch.items()}
        assert line["weights"].sum() == sum(int(sample.mask[1:].sum()) for sample in row)
        for t in np.flatnonzero(line["weights"]):
            assert line["segment_ids"][t] == line["segment_ids"][t + 1] > 0
            assert line["targets"][t] == line["tokens"][t + 1]
        for segment, sample in enumerate(row, 1):
            inside = line["segment_ids"] == segment
            np.testing.assert_array_equal(line["tokens"][inside], sample.tokens)
            np.testing.assert_array_equal(line["positions"][inside], np.arange(len(sample)))
        padding = line["segment_ids"] == 0
        assert not any(array[padding].any() for array in line.values())


def test_collate_by_hand() -> None:
    first = Sample(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
    second = Sample(np.array([8, 9], np.int32), np.array([True, True]))
    batch = collate([[first, second]], 6)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "tokens": [[5, 6, 7, 8, 9, 0]],
        "targets": [[6, 7, 0, 9, 0, 0]],
        "weights": [[0, 1, 0, 1, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0]],
    }
    for too_long in (lambda: collate([[first, second]], 4), lambda: pack([3], 2)):
        with pytest.raises(ValueError, match="truncate it first"):
            too_long()


def first_tokens(batch: dict[str, np.ndarray]) -> list[int]:
    return [int(token) for token in batch["tokens"][:, 0]]


def test_batches_depend_on_the_step_alone() -> None:
    rows = [[Sample(np.array([i, 1], np.int32), np.array([True, True]))] for i in range(1, 8)]
    batches = Batches(rows=rows, batch_size=3, max_length=4, seed=5)
    assert len(batches) == 7
    assert batches.steps_per_epoch == pytest.approx(7 / 3)
    stream = [token for step in range(7) for token in first_tokens(batches.batch(step))]
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    resumed = Batches(rows=rows, batch_size=3, max_length=4, seed=5)
    assert [first_tokens(resumed.batch(step)) for step in (6, 2)] == [stream[18:21], stream[6:9]]
    other = Batches(rows=rows, batch_size=3, max_length=4, seed=6)
    assert [t for step in range(7) for t in first_tokens(other.batch(step))] != stream


def test_sets_are_mixed_by_their_weights() -> None:
    """A set of weight 2 comes twice in an epoch; of 0.5, another half in each of two epochs."""
    rows = [[Sample(np.array([i, 1], np.int32), np.array([True, True]))] for i in range(12)]
    sets = ((2, 2.0), (6, 0.5), (4, 1.0))
    batches = Batches(rows=rows, batch_size=11, max_length=4, seed=5, sets=sets)
    assert (len(batches), batches.steps_per_epoch) == (11, 1.0)
    epochs = [batches.indices(step) for step in range(4)]
    for epoch in epochs:
        assert sorted(i for i in epoch if i < 2) == [0, 0, 1, 1]
        assert sorted(i for i in epoch if i >= 8) == [8, 9, 10, 11]
        assert epoch != sorted(epoch)
    halves = [[i for i in epoch if 2 <= i < 8] for epoch in epochs]
    for first, second in (halves[:2], halves[2:]):
        assert sorted(first + second) == [2, 3, 4, 5, 6, 7]
    again = Batches(rows=rows, batch_size=11, max_length=4, seed=5, sets=sets)
    assert [again.indices(step) for step in (3, 0)] == [epochs[3], epochs[0]]
    assert (
        Batches(rows=rows, batch_size=11, max_length=4, seed=6, sets=sets).indices(0) != epochs[0]
    )
    # Weights of 1 change nothing.
    plain = Batches(rows=rows, batch_size=12, max_length=4, seed=5)
    even = Batches(rows=rows, batch_size=12, max_length=4, seed=5, sets=((5, 1.0), (7, 1.0)))
    assert plain.indices(3) == even.indices(3)


def test_evaluation_batches_have_one_shape_and_keep_order() -> None:
    rows = [[Sample(np.array([i, 1], np.int32), np.array([True, True]))] for i in range(1, 8)]
    batches = list(evaluation_batches(rows, 3, max_length=4))
    assert [first_tokens(batch) for batch in batches] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert batches[-1]["weights"].sum() == 1
    assert batches[-1]["segment_ids"][1:].sum() == 0
    assert [
        first_tokens(batch) for batch in evaluation_batches(rows, 3, max_length=4, limit=2)
    ] == [[1, 2, 0]]
