"""Packing, batches, and the data sets of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_cases import BYTES, user, write
from hypothesis import given
from hypothesis import strategies as st

from lorax_ft.config import DataConfig
from lorax_ft.data.batches import Batches, evaluation_batches, load_data
from lorax_ft.data.chat import Sample
from lorax_ft.data.formats import split_answer
from lorax_ft.data.packing import collate, pack

# -------------------- packing and batches


def sample_of(length: int, label: bool = True) -> Sample:
    return Sample(np.arange(1, length + 1, dtype=np.int32), np.full(length, label))


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_sample_whole(lengths: list[int]) -> None:
    samples = [sample_of(length) for length in lengths]
    rows = pack(samples, 20)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, samples))
    assert all(0 < sum(map(len, row)) <= 20 for row in rows)
    # Else two of these rows would fit into one.
    assert sum(sum(map(len, row)) <= 10 for row in rows) <= 1
    assert rows == pack(samples, 20)


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
    for too_long in (lambda: collate([[first, second]], 4), lambda: pack([first], 2)):
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


def test_evaluation_batches_have_one_shape_and_keep_order() -> None:
    rows = [[Sample(np.array([i, 1], np.int32), np.array([True, True]))] for i in range(1, 8)]
    batches = list(evaluation_batches(rows, 3, max_length=4))
    assert [first_tokens(batch) for batch in batches] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert batches[-1]["weights"].sum() == 1
    assert batches[-1]["segment_ids"][1:].sum() == 0
    assert [
        first_tokens(batch) for batch in evaluation_batches(rows, 3, max_length=4, limit=2)
    ] == [[1, 2, 0]]


# -------------------- a run's data


@pytest.fixture
def questions(tmp_path: Path) -> str:
    lines = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(20)]
    return write(tmp_path / "questions.jsonl", "\n".join(lines))


def test_load_data(questions: str) -> None:
    config = DataConfig(train=(questions,), validation=(questions,), max_length=256, limit=8)
    data = load_data(config, BYTES, seed=0)
    assert len(data.train.rows) == 8
    assert len(data.validation.rows) == 20
    assert (data.train.cut, data.train.dropped) == (0, 0)
    assert data.train.tokens == sum(len(row[0]) for row in data.train.rows)
    assert data.train.labels == 8 * 2  # one digit and the end of the turn
    assert split_answer(data.validation.conversations[19]) == ([user("19 + 1?")], "20")
    packed = load_data(
        DataConfig(train=(questions,), validation=(), max_length=256, limit=8, pack=True),
        BYTES,
        seed=0,
    )
    assert len(packed.train.rows) < 8
    assert packed.train.labels == data.train.labels
    assert packed.validation.rows == []
    assert packed.validation.tokens == 0


def test_validation_rows_are_held_out_by_seed(questions: str) -> None:
    config = DataConfig(train=(questions,), validation_rows=2)

    def answers(seed: int) -> tuple[list[str], list[str]]:
        data = load_data(config, BYTES, seed=seed)
        splits = (data.train, data.validation)
        train, validation = ([split_answer(c)[1] for c in split.conversations] for split in splits)
        return train, validation

    train, validation = answers(0)
    assert len(validation) == 2
    assert sorted(train + validation, key=int) == [str(i + 1) for i in range(20)]
    assert answers(0) == (train, validation) != answers(1)
    many = load_data(DataConfig(train=(questions,), validation_rows=20), BYTES, seed=0)
    assert len(many.validation.conversations) == 2  # a tenth at most


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 3)):
        lines = [json.dumps({"question": f"{split} {i}", "answer": str(i)}) for i in range(count)]
        write(tmp_path / f"{split}.jsonl", "\n".join(lines))
    both = load_data(DataConfig(train=(str(tmp_path),)), BYTES, seed=0)
    assert (len(both.train.rows), len(both.validation.rows)) == (20, 3)
    none = load_data(DataConfig(train=(str(tmp_path),), validation_rows=0), BYTES, seed=0)
    assert (len(none.train.rows), len(none.validation.rows)) == (20, 0)
    other = load_data(DataConfig(train=(str(tmp_path),), validation_split="dev"), BYTES, seed=0)
    assert (len(other.train.rows), len(other.validation.rows)) == (18, 2)
