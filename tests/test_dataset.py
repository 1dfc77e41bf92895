"""A run's data, from its sources to rows of samples."""

from __future__ import annotations

import json
import os
import subprocess
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import BYTES, CHATML, assistant, make_tokenizer, user, write

from lorax_ft.config import DataConfig
from lorax_ft.data import examples, parts
from lorax_ft.data.batches import Batches
from lorax_ft.data.chat import Encoder
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.dataset import Dataset, Split, check_sources, load_data
from lorax_ft.data.formats import split_answer
from lorax_ft.data.rows import Row
from lorax_ft.data.sources import read_rows, split_limit

TOOL = {"type": "function", "function": {"name": "add"}}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    return write(path, "\n".join(map(json.dumps, rows)))


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(count)]


def load(*paths: str, **options: Any) -> Dataset:
    options = {"validation_rows": 0} | options
    return load_data(DataConfig(train=paths, **options), BYTES, seed=0)


def labels(split: Split) -> list[str]:
    """The labeled text of each sample, without the end of the turn."""
    texts = []
    for row in split.rows:
        for sample in row:
            texts.append(BYTES.decode(sample.tokens[sample.mask]).removesuffix("<|im_end|>"))
    return texts


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return lines(tmp_path / "questions.jsonl", numbers(20))


def test_load_data(questions: str) -> None:
    data = load(questions, validation=(questions,), limit=8)
    assert (data.train.count, len(data.train.rows)) == (8, 8)
    assert len(data.validation.rows) == 20
    assert (data.train.cut, data.train.dropped) == (0, 0)
    assert data.train.tokens == sum(len(row[0]) for row in data.train.rows)
    assert data.train.labels == 8 * 2  # one digit and the end of the turn
    assert data.train.examples == []
    last = data.validation.examples[19]
    assert isinstance(last, Conversation)
    assert split_answer(last.messages) == ([user("19 + 1?")], "20")
    packed = load(questions, limit=8, pack=True)
    assert len(packed.train.rows) < 8
    assert packed.train.labels == data.train.labels
    assert len(packed.validation.rows) == 0
    assert packed.validation.tokens == 0


def test_validation_rows_leave_rows_to_train_on(questions: str) -> None:
    with pytest.raises(ValueError, match=r"data.validation_rows is 0.99, which leaves none of the"):
        load_data(DataConfig(train=(questions,), validation_rows=0.99), BYTES, seed=0)


def test_validation_rows_are_held_out_by_seed(questions: str) -> None:
    config = DataConfig(train=(questions,), validation_rows=2)

    def answers(seed: int) -> tuple[list[str], list[str]]:
        data = load_data(config, BYTES, seed=seed)
        return labels(data.train), labels(data.validation)

    train, validation = answers(0)
    # As numpy's generator chose them in the first version: a run must resume with the same rows.
    chosen = sorted(np.random.default_rng(0).permutation(20)[:2].tolist())
    assert validation == [str(i + 1) for i in chosen]
    assert sorted(train + validation, key=int) == [str(i + 1) for i in range(20)]
    assert answers(0) == (train, validation) != answers(1)
    many = load_data(DataConfig(train=(questions,), validation_rows=20), BYTES, seed=0)
    assert many.validation.count == 2  # a tenth at most
    part = load_data(DataConfig(train=(questions,), validation_rows=0.26), BYTES, seed=0)
    assert (part.train.count, part.validation.count) == (14, 6)  # a fraction has no limit


def test_the_first_rows_of_a_source(questions: str, tmp_path: Path) -> None:
    data = load(f"{questions}[:3]", f"{questions}[:2]=2", validation=(f"{questions}[:4]",))
    assert labels(data.train) == ["1", "2", "3", "1", "2"]
    assert data.train.sets == ((3, 1.0), (2, 2.0))
    assert data.validation.count == 4
    with pytest.raises(ValueError, match=r"questions.jsonl\[:0\] takes no rows"):
        load(f"{questions}[:0]")
    # A file of that name is itself.
    odd = lines(tmp_path / "odd.jsonl[:1]", numbers(3))
    assert split_limit(odd) == (odd, None)
    # The validation split of a folder is read as a whole.
    folder = tmp_path / "both"
    folder.mkdir()
    for split in ("train", "test"):
        lines(folder / f"{split}.jsonl", numbers(5))
    data = load_data(DataConfig(train=(f"{folder}[:3]",)), BYTES, seed=0)
    assert (data.train.count, data.validation.count) == (3, 5)


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    import datasets

    folder, saved = str(tmp_path / "files"), str(tmp_path / "saved")
    Path(folder).mkdir()
    splits = {"train": numbers(20), "test": numbers(3)}
    for split, rows in splits.items():
        lines(Path(folder) / f"{split}.jsonl", rows)
    tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(saved)
    for path in (folder, saved):
        sizes = []
        for options in ({}, {"validation_rows": 0}, {"validation_split": "dev"}):
            data = load_data(DataConfig(train=(path,), **options), BYTES, seed=0)
            sizes.append((len(data.train.rows), len(data.validation.rows)))
        assert sizes == [(20, 3), (20, 0), (18, 2)]


def test_sources_of_several_formats(tmp_path: Path, questions: str) -> None:
    alpaca = lines(tmp_path / "alpaca.jsonl", [{"instruction": "a", "output": "b"}])
    talk = lines(tmp_path / "talk.jsonl", [{"messages": [user("a"), assistant("c")]}])
    data = load(alpaca, talk, questions, limit=3)
    assert labels(data.train) == ["b", "c", "1"]
    assert data.train.sets == ((3, 1.0),)


def test_weights_mix_sets(tmp_path: Path, questions: str) -> None:
    other = lines(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}] * 4)
    for pack in (False, True):
        data = load(f"{questions}=0.5", f"{other}=2", pack=pack)
        rows, (first, second) = data.train.rows, data.train.sets
        assert (first[1], second[1]) == (0.5, 2.0)
        assert first[0] + second[0] == len(rows)
        # A row of the model holds samples of one set, so that the weights hold for its rows.
        for i, row in enumerate(rows):
            is_other = i >= first[0]
            for sample in row:
                assert ("a<|im_end|>" in BYTES.decode(sample.tokens)) == is_other
    data = load(f"{questions}=0.5", f"{other}=2")
    batches = Batches(
        rows=data.train.rows, sets=data.train.sets, batch_size=18, max_length=256, seed=0
    )
    assert batches.steps_per_epoch == 1
    assert sum(i >= 20 for i in batches.indices(0)) == 8


def test_documents_fill_rows_or_have_one_each(tmp_path: Path) -> None:
    documents = ["once " * 12, "", "upon a time", " ", "the end " * 8]
    path = lines(tmp_path / "text.jsonl", [{"text": text} for text in documents])
    packed = load(path, pack=True, max_length=32).train
    stream = [token for row in packed.rows for sample in row for token in sample.tokens.tolist()]
    # Every text is there in full, and ends with the end-of-sequence token.
    ends = [text + "<|im_end|>" for text in documents if text.strip()]
    assert BYTES.decode(stream) == "".join(ends)
    filled = [sum(map(len, row)) for row in packed.rows]
    assert filled[:-1] == [32] * (len(filled) - 1)
    assert (packed.count, packed.cut, packed.dropped, packed.tokens) == (5, 0, 2, len(stream))
    single = load(path, max_length=32).train
    assert (len(single.rows), single.count, single.cut, single.dropped) == (3, 5, 2, 2)
    assert BYTES.decode(single.rows[1][0].tokens) == "upon a time<|im_end|>"
    assert single.rows[1][0].mask.all()


def test_the_loss_is_on_the_completion(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    for pack in (False, True):
        split = load(path, pack=pack).train
        ((sample,),) = split.rows
        assert BYTES.decode(sample.tokens) == "1 + 1 = 2<|im_end|>"
        assert labels(split) == [" 2"]


def test_what_is_not_used_is_counted(tmp_path: Path) -> None:
    turns = [user("a"), {**assistant("b"), "reasoning_content": "t", "weight": 1}]
    rows = [
        {"messages": turns, "tools": [TOOL], "category": "x"},
        {"messages": turns, "tools": None, "category": "y", "chat_template_kwargs": {"think": 1}},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    unused = {
        "column category": 2,
        "message field reasoning_content (not in the chat template)": 2,
        "tools (not in the chat template)": 1,
        "template variable think (not in the chat template)": 1,
    }
    assert load(path).train.unused == unused
    template = f"{BYTES.chat_template}{{# tools, think and thinking #}}"
    knowing = load_data(
        DataConfig(train=(path,), validation_rows=0), make_tokenizer(template), seed=0
    )
    assert knowing.train.unused == {"column category": 2}


def test_tools_and_template_variables_come_from_options(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", numbers(1))
    tools = write(tmp_path / "tools.json", json.dumps([TOOL]))
    options = {"tools": tools, "template_args": ("think=false", "date=26 Nov", "depth=3")}
    (example,) = load(path, validation=(path,), **options).validation.examples
    assert isinstance(example, Conversation)
    assert example.tools == [TOOL]
    assert example.template_args == {"think": False, "date": "26 Nov", "depth": 3}
    with pytest.raises(ValueError, match=r"data.tools: no.json cannot be read as JSON"):
        load(path, tools="no.json")
    with pytest.raises(ValueError, match=r"data.template_args: 'think' is not of the form "):
        DataConfig(template_args=("think",))
    with pytest.raises(ValueError, match="tools is not a variable to set: it comes from the data"):
        DataConfig(template_args=("tools=[]",))


def test_the_first_row_of_every_source_is_checked(tmp_path: Path, questions: str) -> None:
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for options in ({"train": (questions, pairs)}, {"train": (questions,), "validation": (pairs,)}):
        with pytest.raises(ValueError, match=r"pairs.jsonl, line 1: a preference pair"):
            check_sources(DataConfig(**options))
    check_sources(DataConfig(train=(f"{questions}=2",)))
    with pytest.raises(ValueError, match=r"has a.jsonl=2, but only data.train has weights; give a"):
        check_sources(DataConfig(train=(questions,), validation=("a.jsonl=2",)))


def test_conversations_that_are_too_long(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": a} for q, a in (("a", "b"), ("a", "b" * 50), ("a" * 90, "b"))]
    train = load(lines(tmp_path / "a.jsonl", rows), max_length=50).train
    assert (train.count, len(train.rows), train.cut, train.dropped) == (3, 2, 2, 1)
    (sample,) = train.rows[1]
    assert len(sample) == 50
    assert sample.mask[-1]
    # The first token is never a target.
    path = lines(tmp_path / "b.jsonl", rows[:1])
    config = DataConfig(train=(path,), validation_rows=0, loss_on="all")
    with pytest.raises(ValueError, match="none of the 1 samples keeps a label"):
        load_data(config, make_tokenizer("x"), seed=0)


def test_no_label_within_the_length(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"question": "a" * 30, "answer": "b"}] * 3)
    with pytest.raises(ValueError, match="none of the 3 samples keeps a label within 16 tokens"):
        load(path, max_length=16)


def test_rows_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data may be larger than memory: few rows live at once, and samples lie in a file."""
    path = lines(tmp_path / "a.jsonl", numbers(6000))
    living = most = 0

    def forget() -> None:
        nonlocal living
        living -= 1

    def watched(*args: Any, **options: Any) -> Iterator[Row]:
        nonlocal living, most
        for row in read_rows(*args, **options):
            weakref.finalize(row, forget)
            living += 1
            most = max(most, living)
            yield row

    monkeypatch.setattr(examples, "read_rows", watched)
    split = load(path).train
    assert len(split.rows) == 6000
    assert most < 3000
    assert isinstance(split.rows.samples.tokens, np.memmap)
    assert labels(split)[-1] == "6000"


def test_tokens_are_kept_between_runs(
    tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    silent = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    path = lines(tmp_path / "a.jsonl", [{"messages": [user("a"), assistant("b")], "tools": [TOOL]}])

    def both() -> tuple[Dataset, Dataset]:
        config = DataConfig(train=(path,), validation_rows=0, cache=cache)
        return load(questions, cache=cache), load_data(config, silent, seed=0)

    first, counted = both()
    assert counted.train.endless == 1
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *args: encoded.append(1) or encode(*args))
    again, counted_again = both()
    assert not encoded
    assert labels(again.train) == labels(first.train)
    assert counted_again.train.endless == 1
    assert counted_again.train.unused == counted.train.unused
    # Anything else is other tokens.
    load(questions, cache=cache, loss_on="all")
    load(questions, cache=cache, limit=10)
    assert len(encoded) == 2
    # A damaged file is made anew, and so is one that the killed run did not finish.
    for file in (tmp_path / "cache").iterdir():
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        file.write_bytes(damaged)
    repaired, _ = both()
    assert len(encoded) == 4
    assert labels(repaired.train) == labels(first.train)
    both()
    assert len(encoded) == 4


def test_old_tokens_are_deleted(tmp_path: Path, questions: str) -> None:
    cache = tmp_path / "cache"
    load(questions, cache=str(cache))
    (kept,) = cache.iterdir()
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(kept, (month_ago, month_ago))
    load(questions, cache=str(cache))  # a use
    assert kept.exists()
    os.utime(kept, (month_ago, month_ago))
    load(questions, cache=str(cache), limit=10)
    assert not kept.exists()


def test_no_room_for_tokens(
    tmp_path: Path, questions: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert len(load(questions, cache=str(file / "cache")).train.rows) == 20
    assert "tokens are not kept" in caplog.text
    assert len(load(questions, cache=None).train.rows) == 20


def test_several_processes_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 16)
    path = lines(tmp_path / "a.jsonl", numbers(100))
    alone = load(path, cache=None, num_proc=1).train
    together = load(path, cache=None, num_proc=2).train
    assert labels(together) == labels(alone)
    assert labels(together)[-1] == "100"
    rejects = make_tokenizer(
        "{% if messages[0].content.startswith('50') %}{{ raise_exception('no') }}{% endif %}"
        + CHATML
    )
    config = DataConfig(train=(path,), validation_rows=0, cache=None, num_proc=2)
    with pytest.raises(ValueError, match=r"a.jsonl, line 51: the chat template rejects"):
        load_data(config, rejects, seed=0)


def test_a_killed_tokenizing_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that used too much memory."""
    monkeypatch.setattr(parts._Process, "_start", _dying_process)
    path = lines(tmp_path / "a.jsonl", numbers(10))
    with pytest.raises(ValueError, match=r"ended with status -9; .* give data.num_proc 1"):
        load(path, cache=None, num_proc=2)


def _dying_process(process: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", "kill -9 $$"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_rows_are_no_longer_than_the_longest_sample_needs(questions: str) -> None:
    tokens = {
        (length, pack): load(questions, max_length=length, pack=pack).max_length
        for length in (64, 8192)
        for pack in (False, True)
    }
    assert tokens == {(64, False): 64, (64, True): 64, (8192, False): 128, (8192, True): 8192}
    config = DataConfig(train=(questions,), max_length=8192)
    assert load_data(config, BYTES, seed=0, blocks=512).max_length == 512
