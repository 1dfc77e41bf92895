"""Rows, conversations, loss masks, packing and batches."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lorax_ft.config import DataConfig
from lorax_ft.data import formats
from lorax_ft.data.batches import Batches, evaluation_batches, load_data
from lorax_ft.data.chat import Sample, describe_row, encode, encode_all, encode_prompt
from lorax_ft.data.formats import Message, detect_shape, split_answer, to_messages
from lorax_ft.data.packing import collate, pack
from lorax_ft.data.sources import Row, read_rows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # no generation prompt; the answer begins with a space, and ends with the tokenizer's eos
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (  # no special tokens; the prompt and the turns end with a space
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
UNSTABLE = "{{ messages | length }} turns\n" + CHATML
REFUSING = "{{ raise_exception('roles must alternate') }}"


def make_tokenizer(template: str | None = CHATML, *, trim_offsets: bool = True, merges: int = 0) -> Any:
    """A byte-level BPE tokenizer of `merges` merges."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant the answer is twelve\n\n one and one is two"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


BYTES = make_tokenizer()
MERGED = make_tokenizer(merges=40)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def learnt(messages: list[Message], tokenizer: Any, **options: Any) -> list[str]:
    """The pieces of a conversation that count in the loss."""
    sample = encode(messages, tokenizer, **{"max_length": 1000, **options})
    return [text for text, counts in describe_row(tokenizer, sample) if counts]


def sample_of(length: int, label: bool = True) -> Sample:
    return Sample(np.arange(1, length + 1, dtype=np.int32), np.full(length, label))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


# Sources


def test_jsonl_rows_carry_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '\ufeff{"question": "a\u2028b"}\n\n{"question": "c"}\r\n')
    rows = read_rows((path,))
    assert [row.fields["question"] for row in rows] == ["a\u2028b", "c"]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_csv_is_text_and_carries_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ',question,answer\n0,"two\nlines",007\n1,b,None\n')
    assert read_rows((path,)) == [
        Row(fields={"": "0", "question": "two\nlines", "answer": "007"}, where=f"{path}, line 2"),
        Row(fields={"": "1", "question": "b", "answer": "None"}, where=f"{path}, line 4"),
    ]


def test_json_parquet_and_limit(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    content = [{"messages": [user("a"), assistant("b")]}, {"messages": [assistant("c")]}]
    json_path = write(tmp_path / "train.json", json.dumps(content))
    parquet_path = str(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), parquet_path)
    rows = read_rows((json_path, parquet_path), limit=3)
    assert [row.fields for row in rows] == [*content, content[0]]
    assert [row.where.rpartition(", ")[2] for row in rows] == ["item 1", "item 2", "row 1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": }\n', r"a.jsonl, line 2: not JSON: expecting value \(column 7\)"),
        ("a.jsonl", '{"q": 1}\n[1]\n', "a.jsonl, line 2: a row must be an object, not list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON: nested too deeply"),
        ("a.jsonl", "\n\n", "a.jsonl holds no rows"),
        ("a.json", '[{"q": 1},\n {"q" 2}]', "a.json, line 2: not JSON: expecting ':'"),
        ("a.json", '[{"q": 1}, 2]', "a.json, item 2: a row must be an object, not int"),
        ("a.json", '{"q": 1}', "a.json: holds one dict, not a list of objects"),
        ("a.json", '{"q": 1}\n{"q": 2}', "a.json, line 2: .*one object a line wants the suffix .jsonl"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "q,a\n1,2\n3\n", "a.csv, line 3: its number of fields is 1, but the header's is 2"),
        ("a.csv", "q,q\n1,2\n", "a.csv, line 1: the header names q twice"),
        ("a.csv", 'q,a\n1,"2\n', "a.csv, line 2: not CSV"),
        ("a.csv", "q,a\n", "a.csv holds no rows"),
        ("a.parquet", "no", "a.parquet cannot be read as Parquet"),
        ("a.txt", "no", "a.txt is not of a kind that can be read; supported: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_rows((write(tmp_path / name, text),))
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text_name_the_line(tmp_path: Path) -> None:
    for suffix in ("jsonl", "json"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(b'[{"q": 1},\n{"q": "\xff"}]' if suffix == "json" else b'{"q": 1}\n{"q": "\xff"}\n')
        with pytest.raises(ValueError, match=r"line 2: not UTF-8 text"):
            read_rows((str(path),))


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    write(tmp_path / "train.jsonl", "{}")
    (tmp_path / "bare").mkdir()
    cases = {
        f"{tmp_path}/trian.jsonl": "no file .*; the nearest in its folder is train.jsonl",
        f"{tmp_path}/none/a.jsonl": "there is no folder",
        f"{tmp_path}/bare": r"holds no file train\.jsonl or train\.json or",
        "owner/name": "no such file, and the hub gave no split 'train' .*: Couldn't reach the Hub$",
        "trian.jsonll": "no file trian.jsonll",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_rows((path,))


def test_hub_ids_name_a_subset_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"q": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(("openai/gsm8k:main",), split="test", revision="abc")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
    assert rows == [Row(fields={"q": "a"}, where="openai/gsm8k:main, row 1")]


# Formats

CONVERSATION = [user("1 + 1?"), assistant("2")]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAPES: list[tuple[dict[str, Any], tuple[str, ...], str, list[Message]]] = [
    ({"messages": CONVERSATION}, (), "messages", CONVERSATION),
    ({"chat": CONVERSATION}, ("messages=chat",), "messages", CONVERSATION),
    (
        {"messages": [{"who": "human", "content": "1 + 1?"}, {"who": "gpt", "content": "2"}]},
        ("role=who",),
        "messages",
        CONVERSATION,
    ),
    (
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}], "system": "Be brief."},
        (),
        "sharegpt",
        [SYSTEM, *CONVERSATION],
    ),
    ({"instruction": "1 + 1?", "output": "2"}, (), "alpaca", CONVERSATION),
    (
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["Hi", "Ho"]]},
        (),
        "alpaca",
        [SYSTEM, user("Hi"), assistant("Ho"), user("Add.\n1 + 1"), assistant("2")],
    ),
    ({"instruction": "1 + 1?", "input": None, "output": "2", "history": None}, (), "alpaca", CONVERSATION),
    ({"question": "1 + 1?", "answer": "2"}, (), "question_answer", CONVERSATION),
    ({"Q": "1 + 1?", "A": "2"}, ("question=Q", "answer=A"), "question_answer", CONVERSATION),
]


@pytest.mark.parametrize(("content", "fields", "shape", "expected"), SHAPES)
def test_shapes(content: dict[str, Any], fields: tuple[str, ...], shape: str, expected: list[Message]) -> None:
    row = Row(fields=content, where="a.jsonl, line 1")
    assert detect_shape(row, fields=fields) == shape
    assert to_messages(row, shape=detect_shape(row, fields=fields), fields=fields) == expected
    with_system = to_messages(row, shape=detect_shape(row, fields=fields), fields=fields, system="Be kind.")
    kept = [SYSTEM] if SYSTEM in expected else [{"role": "system", "content": "Be kind."}]
    assert with_system == kept + [message for message in expected if message != SYSTEM]


@pytest.mark.parametrize(
    ("content", "fields", "shape", "message"),
    [
        ({"question": "a", "anwser": "b"}, (), "question_answer", "no field 'answer'; .*--data.fields answer=anwser"),
        ({"question": "a"}, ("answer=solution",), "question_answer", "no field 'solution'; it has question"),
        ({"question": "a", "answer": "b"}, ("awnser=b",), "question_answer", "did you mean 'answer'"),
        ({"question": "a", "answer": 4}, (), "question_answer", "line 7: answer is int, not text"),
        ({"question": "a", "answer": "\ud800"}, (), "question_answer", "answer holds half of a surrogate pair"),
        ({"messages": [user("a")]}, (), "messages", "line 7: no turn is the assistant's"),
        ({"messages": []}, (), "messages", "line 7: no turn is the assistant's"),
        ({"messages": "a"}, (), "messages", "messages is str, not a list"),
        ({"messages": ["a"]}, (), "messages", "turn 1: a turn must be an object"),
        ({"messages": [user("a"), {"role": "assistant"}]}, (), "messages", "line 7, turn 2: no field 'content'"),
        ({"messages": [{"role": "assistant", "content": [1]}]}, (), "messages", "turn 1: content is list, not text"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            (),
            "messages",
            "turn 1: unknown role 'tool'; known: system",
        ),
        ({"conversations": [user("a")]}, (), "sharegpt", "turn 1: no field 'from'; it has role, content"),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            (),
            "alpaca",
            "pair 1 of the history: not a list of two",
        ),
    ],
)
def test_bad_rows_name_the_place(content: dict[str, Any], fields: tuple[str, ...], shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_messages(Row(fields=content, where="a.jsonl, line 7"), shape=shape, fields=fields)
    assert "\n" not in str(error.value)


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"its fields \(text\) fit no shape; known: messages \(messages\); sharegpt"):
        detect_shape(Row(fields={"text": "a"}, where="a.jsonl, line 1"))


def test_split_answer_takes_the_last_turn() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert split_answer(messages) == (messages[:3], "d")


def test_doctests() -> None:
    assert doctest.testmod(formats).failed == 0


# Chat templates and masks


def test_multi_turn_mask_ends_with_the_end_of_turn() -> None:
    messages = [user("one?"), assistant("two"), user("and?"), assistant("the answer\n is twelve")]
    for tokenizer in (BYTES, MERGED):
        assert learnt(messages, tokenizer) == ["two<|im_end|>", "the answer\n is twelve<|im_end|>"]
        assert "".join(learnt(messages, tokenizer, loss_on="all")) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_other_templates(trim_offsets: bool) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant(" d ")]
    llama2 = make_tokenizer(LLAMA2, trim_offsets=trim_offsets)
    assert learnt(messages, llama2) == [" b <|im_end|>", "  d  <|im_end|>"]
    # Without a special token nothing tells the turn's end from the template's white space: all of it is learnt.
    plain = make_tokenizer(PLAIN, trim_offsets=trim_offsets)
    assert learnt(messages, plain) == ["b ", " d  "]


def test_a_token_that_holds_the_answers_first_letters_counts() -> None:
    """ "assistant: " ends with a space, which the tokenizer draws into the answer's first word."""
    tokenizer = make_tokenizer(PLAIN, merges=60)
    assert learnt([user("one?"), assistant("twelve")], tokenizer) == [" twelve "]


texts = st.text(max_size=8) | st.sampled_from(["  ", "\n\n", " é ", "日本", "👩‍👩‍👧", "\u3000", "\r\n", ""])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.booleans())
def test_labels_are_the_assistants_bytes(pairs: list[tuple[str, str]], trim_offsets: bool) -> None:
    """Whatever the text, in an alphabet of bytes the labels are its answers' bytes and end-of-turn tokens."""
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    tokenizer = BYTES if trim_offsets else UNTRIMMED
    sample = encode(messages, tokenizer, max_length=1000)
    assert sample.tokens.dtype == np.int32
    assert sample.mask.dtype == bool
    labels = tokenizer.decode(sample.tokens[sample.mask].tolist(), clean_up_tokenization_spaces=False)
    assert labels == "".join(answer + "<|im_end|>" for _, answer in pairs)
    whole = tokenizer.decode(sample.tokens.tolist(), clean_up_tokenization_spaces=False)
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)


UNTRIMMED = make_tokenizer(trim_offsets=False)


def test_prompt_is_the_sample_before_its_labels() -> None:
    prompt, answer = split_answer([user("one and é?"), assistant("two")])
    tokens = encode_prompt(prompt, MERGED)
    sample = encode([*prompt, assistant(answer)], MERGED, max_length=100)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, sample.tokens[: int(np.argmax(sample.mask))])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (UNSTABLE, r"line 3: the chat template writes the turns up to 2 otherwise .*; use --data.loss_on all"),
        (REFUSING, "line 3: the chat template refuses this conversation: roles must alternate"),
        (None, "has no chat template; take an instruction-tuned checkpoint"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        encode([user("a"), assistant("b")], tokenizer, max_length=50, where="a.jsonl, line 3")
    if template == UNSTABLE:
        assert encode([user("a"), assistant("b")], tokenizer, max_length=50, loss_on="all").mask.all()


def test_cut_and_dropped_are_counted() -> None:
    conversations = [[user("a"), assistant("b")], [user("a"), assistant("b" * 50)], [user("a" * 90), assistant("b")]]
    where = ["1", "2", "3"]
    encoded = encode_all(conversations, BYTES, max_length=50, where=where)
    assert (len(encoded.samples), encoded.cut, encoded.dropped) == (2, 2, 1)
    assert len(encoded.samples[1]) == 50
    assert encoded.samples[1].mask[-1]
    with pytest.raises(ValueError, match="none of the 3 samples keeps a token to learn within 8 tokens"):
        encode_all(conversations, BYTES, max_length=8, where=where)
    with pytest.raises(ValueError, match="none of the 1 samples"):  # one token is nobody's target
        encode_all([[assistant("b")]], make_tokenizer("x"), max_length=8, loss_on="all", where=["1"])


# Packing and batches


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_sample_whole(lengths: list[int]) -> None:
    samples = [sample_of(length) for length in lengths]
    rows = pack(samples, 20)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, samples))
    assert all(0 < sum(map(len, row)) <= 20 for row in rows)
    assert sum(sum(map(len, row)) <= 10 for row in rows) <= 1  # or two of them would have gone together
    assert rows == pack(samples, 20)


@given(st.lists(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4), min_size=1, max_size=4))
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
        with pytest.raises(ValueError, match="cut it first"):
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
    assert [first_tokens(batch) for batch in evaluation_batches(rows, 3, max_length=4, limit=2)] == [[1, 2, 0]]


# A run's data


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
    packed = load_data(DataConfig(train=(questions,), validation=(), max_length=256, limit=8, pack=True), BYTES, seed=0)
    assert len(packed.train.rows) < 8
    assert packed.train.labels == data.train.labels
    assert packed.validation.rows == []
    assert packed.validation.tokens == 0


def test_validation_rows_are_held_out_by_seed(questions: str) -> None:
    config = DataConfig(train=(questions,), validation_rows=2)

    def answers(seed: int) -> tuple[list[str], list[str]]:
        data = load_data(config, BYTES, seed=seed)
        parts = (data.train, data.validation)
        train, validation = ([split_answer(c)[1] for c in part.conversations] for part in parts)
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


def test_importing_the_data_room_is_cheap() -> None:
    code = (
        "import sys, lorax_ft.data.batches as _; "
        "print([m for m in ('jax', 'transformers', 'datasets', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
