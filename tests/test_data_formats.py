"""Rows in every supported format become conversations."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from data_cases import assistant, user

from lorax_ft.data import formats
from lorax_ft.data.formats import Message, detect_shape, split_answer, to_messages
from lorax_ft.data.sources import Row

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
        {
            "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}],
            "system": "Be brief.",
        },
        (),
        "sharegpt",
        [SYSTEM, *CONVERSATION],
    ),
    ({"instruction": "1 + 1?", "output": "2"}, (), "alpaca", CONVERSATION),
    (
        {
            "instruction": "Add.",
            "input": "1 + 1",
            "output": "2",
            "system": "Be brief.",
            "history": [["Hi", "Ho"]],
        },
        (),
        "alpaca",
        [SYSTEM, user("Hi"), assistant("Ho"), user("Add.\n1 + 1"), assistant("2")],
    ),
    (
        {"instruction": "1 + 1?", "input": None, "output": "2", "history": None},
        (),
        "alpaca",
        CONVERSATION,
    ),
    ({"question": "1 + 1?", "answer": "2"}, (), "question_answer", CONVERSATION),
    ({"Q": "1 + 1?", "A": "2"}, ("question=Q", "answer=A"), "question_answer", CONVERSATION),
]


@pytest.mark.parametrize(("content", "fields", "shape", "expected"), SHAPES)
def test_shapes(
    content: dict[str, Any], fields: tuple[str, ...], shape: str, expected: list[Message]
) -> None:
    row = Row(fields=content, where="a.jsonl, line 1")
    assert detect_shape(row, fields=fields) == shape
    assert to_messages(row, shape=detect_shape(row, fields=fields), fields=fields) == expected
    with_system = to_messages(
        row, shape=detect_shape(row, fields=fields), fields=fields, system="Be kind."
    )
    kept = [SYSTEM] if SYSTEM in expected else [{"role": "system", "content": "Be kind."}]
    assert with_system == kept + [message for message in expected if message != SYSTEM]


@pytest.mark.parametrize(
    ("content", "fields", "shape", "message"),
    [
        (
            {"question": "a", "anwser": "b"},
            (),
            "question_answer",
            "no field 'answer'; .*--data.fields answer=anwser",
        ),
        (
            {"question": "a"},
            ("answer=solution",),
            "question_answer",
            "no field 'solution'; it has question",
        ),
        (
            {"question": "a", "answer": "b"},
            ("awnser=b",),
            "question_answer",
            "did you mean 'answer'",
        ),
        ({"question": "a", "answer": 4}, (), "question_answer", "line 7: answer is int, not text"),
        (
            {"question": "a", "answer": "\ud800"},
            (),
            "question_answer",
            "answer contains an unpaired surrogate",
        ),
        (
            {"messages": [user("a")]},
            (),
            "messages",
            "line 7: the conversation has no assistant turn",
        ),
        ({"messages": []}, (), "messages", "line 7: the conversation has no assistant turn"),
        ({"messages": "a"}, (), "messages", "messages is str, not a list"),
        ({"messages": ["a"]}, (), "messages", "turn 1: a turn must be an object"),
        (
            {"messages": [user("a"), {"role": "assistant"}]},
            (),
            "messages",
            "line 7, turn 2: no field 'content'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [1]}]},
            (),
            "messages",
            "turn 1: content is list, not text",
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            (),
            "messages",
            "turn 1: unknown role 'tool'; known: system",
        ),
        (
            {"conversations": [user("a")]},
            (),
            "sharegpt",
            "turn 1: no field 'from'; it has role, content",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            (),
            "alpaca",
            "pair 1 of the history: must be a list of two texts",
        ),
    ],
)
def test_bad_rows_name_the_place(
    content: dict[str, Any], fields: tuple[str, ...], shape: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_messages(Row(fields=content, where="a.jsonl, line 7"), shape=shape, fields=fields)
    assert "\n" not in str(error.value)


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(
        ValueError,
        match=r"the fields \(text\) match no known shape; known: messages \(messages\); sharegpt",
    ):
        detect_shape(Row(fields={"text": "a"}, where="a.jsonl, line 1"))


def test_split_answer_takes_the_last_turn() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert split_answer(messages) == (messages[:3], "d")


def test_doctests() -> None:
    assert doctest.testmod(formats).failed == 0
