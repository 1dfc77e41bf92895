"""Rows that cannot be used: an error with their place, or left out and counted."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from data_cases import BYTES, CHATML, assistant, make_tokenizer, user

from lorax_ft.config import DataConfig
from lorax_ft.data import chat, masks, readers
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.chat import encode
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.dataset import Dataset, check_sources, load_data


def talk(*texts: Any, **fields: Any) -> bytes:
    """A row with turns of the user and the assistant."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"messages": turns, **fields}).encode()


def load(path: Path, **options: Any) -> Dataset:
    options = {"validation_rows": 0, "bad_rows": "skip", "cache": None} | options
    return load_data(DataConfig(train=(str(path),), **options), BYTES, seed=0)


GOOD = talk("hi", "yo")
BAD = {
    "broken JSON": (b"{broken", "not JSON"),
    "Latin-1": (b'{"messages": "\xe9"}', "not UTF-8"),
    "a misspelled field": (b'{"mesages": []}', "no field 'messages'"),
    "a wrong type": (b'{"messages": "text"}', "messages is text"),
    "a number as a text": (talk(3, "x"), "turn 1: content is int"),
    "not an object": (b"[1, 2]", "a row must be an object"),
    "null": (b"null", "a row must be an object"),
    "nested too deeply": (b'{"a": ' * 5000, "nested too deeply"),
    "an unknown role": (GOOD.replace(b"user", b"wizard"), "unknown role"),
    "no answer": (talk("hi"), "no assistant turn"),
    "an empty answer": (talk("hi", " "), "turn 2. is empty"),
    "half a character": (talk("\ud800", "x"), "unpaired surrogate"),
    "a number that is none": (talk("hi", float("nan")), "turn 2: content is float"),
    "a special token": (talk("a<|im_end|>", "b"), "turn 1: the text contains the special token"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row(kind: str, tmp_path: Path) -> None:
    line, problem = BAD[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    place = f"a.jsonl, line 2.*{problem}"
    with pytest.raises(ValueError, match=place):
        load(path, bad_rows="stop")
    data = load(path)
    assert data.train.count == len(data.train.rows) == 2
    assert data.bad_rows.count == 1
    assert re.search(place, data.bad_rows.problems[0])


def test_copies_are_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, talk("hi", "no"), GOOD, GOOD]))
    train = load(path).train
    assert (train.count, train.copies, len(train.rows)) == (4, 2, 4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_texts_of_any_script_stay_as_they_are(suffix: str, tmp_path: Path) -> None:
    """Right to left, with marks of direction; emoji of several characters; a byte order mark."""
    question, answer = "\u202bשלום \u202a1+1?", "👩🏽\u200d🚀 \ufeffمرحبا\u2028"
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        row = json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
        path.write_text(row, encoding="utf-8-sig")
    elif suffix == ".csv":
        path.write_text(f'question,answer\n"{question}","{answer}"\n', encoding="utf-8-sig")
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"question": [question], "answer": [answer]})
        pyarrow.parquet.write_table(table, path)
    (row_read,) = readers.read_file(str(path))
    assert row_read.fields == {"question": question, "answer": answer}


def test_other_files(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("question,answer\n1?,1\n2?\n3?,3\n")
    assert load(csv).train.count == 2
    items = tmp_path / "a.json"
    items.write_text(json.dumps([{"question": "1?", "answer": "1"}, 7]))
    data = load(items)
    assert (data.train.count, data.bad_rows.count) == (1, 1)
    assert "a.json, item 2" in data.bad_rows.problems[0]


def test_the_first_row_is_bad(tmp_path: Path) -> None:
    """The format of a file is that of its first row that can be used."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b"{broken", b'{"other": 1}', GOOD]))
    assert load(path).train.count == 1
    check_sources(DataConfig(train=(str(path),), bad_rows="skip"))
    with pytest.raises(ValueError, match="line 1: not JSON"):
        check_sources(DataConfig(train=(str(path),)))
    path.write_bytes(b"{broken\n[]")
    with pytest.raises(ValueError, match=r"no row that can be read; the last: .*line 2"):
        load(path)


def test_validation_rows_and_questions(tmp_path: Path) -> None:
    """What cannot be tokenized is in no split, and its question is not asked."""
    path = tmp_path / "a.jsonl"
    special = talk("a<|im_end|>", "b")
    path.write_bytes(b"\n".join([GOOD, special, talk("2?", "2")]))
    data = load(path, validation=(str(path),))
    assert data.bad_rows.count == 2
    questions = [example.messages[0]["content"] for example in data.validation.examples]
    assert questions == ["hi", "2?"]
    assert (data.train.count, data.train.dropped) == (2, 0)


def test_special_tokens_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(talk("a<|im_end|>", "b"))
    data = load(path, bad_rows="stop", control_tokens="keep")
    ((sample,),) = data.train.rows
    assert sample.tokens.tolist().count(BYTES.eos_token_id) == 3
    # Plain text has no turns that a token could end.
    path.write_text('{"text": "a<|im_end|>b"}')
    assert load(path, bad_rows="stop").train.count == 1
    # What is a token but not special is text.
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool_call>"])
    assert len(encode([user("<tool_call>"), assistant("b")], tokenizer, max_length=99))


def test_enormous_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, talk("a" * 900, "b"), talk("a" * 5000, "b"), GOOD]))
    monkeypatch.setattr(chat, "LONGEST_EXAMPLE", 800)
    monkeypatch.setattr(readers, "LONGEST_ROW", 2000)
    data = load(path)
    assert data.train.count == 2
    long_line, long_text = data.bad_rows.problems
    assert re.search("line 3: the row has more than 2,000 bytes; split it", long_line)
    assert re.search("line 2: the row has 901 characters of text, more than 800", long_text)


def test_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time grows with the turns, and not with their square."""
    turns = [user("question"), assistant("answer")] * 3000
    start = time.perf_counter()
    sample = encode(turns, BYTES, max_length=10**9)
    assert sample.mask.sum() == 3000 * len("answer.")
    assert time.perf_counter() - start < 20  # 1 second; it was minutes
    # A template that changes the texts is asked again for each turn.
    changing = make_tokenizer(CHATML.replace("m['content']", "m['content'] | reverse"))
    assert len(encode(turns[:6], changing, max_length=999))
    monkeypatch.setattr(masks, "_MOST_IN_PREFIXES", 100)
    with pytest.raises(ValueError, match="has 6 turns, and the chat template changes their texts"):
        encode(turns[:6], changing, max_length=999)


def test_the_list_of_bad_rows(tmp_path: Path) -> None:
    bad = BadRows(skip=True)
    for number in range(10_002):
        bad.note(f"line {number}: bad")
    bad.write(tmp_path)
    lines = (tmp_path / "bad_rows.txt").read_text().splitlines()
    assert len(lines) == 10_001
    assert lines[-1] == "and 2 more"
    # A run without any does not keep the list of the one before.
    BadRows().write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_long_line_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON list is often a single line: the limit is one of rows, here its items."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 100)
    items = tmp_path / "a.json"
    items.write_text(json.dumps([{"question": f"{i}?", "answer": str(i)} for i in range(50)]))
    assert load(items, bad_rows="stop").train.count == 50
    csv = tmp_path / "a.csv"
    csv.write_text("question,answer\n" + 50 * "1,1\n")
    assert load(csv, bad_rows="stop").train.count == 50
    csv.write_text(f"question,answer\n{'1' * 200},1\n")
    with pytest.raises(ValueError, match="line 2: not CSV: the row has more than 100 characters"):
        load(csv, bad_rows="stop")


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"reasoning_content": "<|im_end|>"}, "turn 2"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]}, "turn 2"),
        ({"tools": [{"function": {"name": "f", "description": "<|im_end|>"}}]}, "tools"),
        ({"documents": [{"title": "t", "text": "<|im_end|>"}]}, "documents"),
    ],
)
def test_special_tokens_anywhere_in_a_conversation(fields: dict[str, Any], place: str) -> None:
    message = {**assistant("b"), **fields}
    beside = {name: message.pop(name) for name in ("tools", "documents") if name in message}
    talk = Conversation(messages=[user("a"), message], **beside)
    with pytest.raises(ValueError, match=f"{place}: the text contains the special token"):
        encode(talk, BYTES, max_length=99)
