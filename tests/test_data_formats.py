"""Rows in every supported format become conversations or plain texts."""

from __future__ import annotations

import doctest
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_cases import assistant, user

from lorax_ft.data import fields as fields_module
from lorax_ft.data import formats, shapes
from lorax_ft.data.conversation import Conversation, Message, PlainText
from lorax_ft.data.formats import Defaults, split_answer, to_example
from lorax_ft.data.rows import Row
from lorax_ft.data.shapes import detect_shape, fitting_shape

CONVERSATION = [user("1 + 1?"), assistant("2")]
PROMPT = [{**user("1 + 1?"), "train": False}, assistant("2")]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAPES: list[tuple[dict[str, Any], tuple[str, ...], str, list[Message]]] = [
    ({"messages": CONVERSATION}, (), "messages", CONVERSATION),
    ({"talk": CONVERSATION}, ("messages=talk",), "messages", CONVERSATION),
    ({"dialogue": CONVERSATION}, (), "messages", CONVERSATION),
    (
        {"messages": [{"who": "human", "content": "1 + 1?"}, {"who": "gpt", "content": "2"}]},
        ("role=who",),
        "messages",
        CONVERSATION,
    ),
    (
        {"messages": '[{"role": "user", "content": "1 + 1?"}, {"from": "gpt", "value": "2"}]'},
        (),
        "messages",
        CONVERSATION,
    ),
    # `datasets` loads a Sequence of a dict as an object of lists.
    (
        {"messages": {"role": ["user", "assistant"], "content": ["1 + 1?", "2"]}},
        (),
        "messages",
        CONVERSATION,
    ),
    ({"messages": None, "question": "1 + 1?", "answer": "2"}, (), "question_answer", CONVERSATION),
    ({"messages": "", "question": "1 + 1?", "answer": "2"}, (), "question_answer", CONVERSATION),
    (
        {
            "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}],
            "system": "Be brief.",
        },
        (),
        "sharegpt",
        [SYSTEM, *CONVERSATION],
    ),
    ({"conversations": CONVERSATION}, (), "sharegpt", CONVERSATION),
    ({"instruction": "1 + 1?", "output": "2"}, (), "alpaca", CONVERSATION),
    ({"instruction": "1 + 1?", "output": "2", "text": "all"}, (), "alpaca", CONVERSATION),
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
    (
        {"instruction": "Add.", "context": "1 + 1", "response": "2"},
        (),
        "alpaca",
        [user("Add.\n1 + 1"), assistant("2")],
    ),
    (
        {"question": "1 + 1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
        (),
        "multiple_choice",
        [user("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4"), assistant("B")],
    ),
    (
        {"": "0", "Question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "D"},
        (),
        "multiple_choice",
        [user("?\nA. 1\nB. 2\nC. 3\nD. 4"), assistant("D")],
    ),
    ({"question": "1 + 1?", "answer": "2"}, (), "question_answer", CONVERSATION),
    ({"Q": "1 + 1?", "A": "2"}, ("question=Q", "answer=A"), "question_answer", CONVERSATION),
    (
        {"prompt": "1 + 1?", "completion": "2"},
        ("question=prompt", "answer=completion"),
        "question_answer",
        CONVERSATION,
    ),
    ({"prompt": "1 + 1?", "response": "2"}, (), "question_answer", CONVERSATION),
    ({"problem": "1 + 1?", "solution": "2"}, (), "question_answer", CONVERSATION),
    ({"query": "1 + 1?", "response": "2"}, (), "question_answer", CONVERSATION),
    ({"input": "1 + 1?", "output": "2"}, (), "question_answer", CONVERSATION),
    (
        {"system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"},
        (),
        "question_answer",
        [SYSTEM, *CONVERSATION],
    ),
    (
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        ("question=prompt", "answer=chosen"),
        "question_answer",
        CONVERSATION,
    ),
    (
        {"prompt": [user("1 + 1?")], "completion": [assistant("2")]},
        (),
        "prompt_completion",
        PROMPT,
    ),
    ({"prompt": [user("1 + 1?")], "completion": "2"}, (), "prompt_completion", PROMPT),
    ({"prompt": "1 + 1?", "completion": assistant("2")}, (), "prompt_completion", PROMPT),
    (
        {
            "prompt": '[{"role": "user", "content": "1 + 1?"}]',
            "completion": '[{"role": "assistant", "content": "2"}]',
        },
        (),
        "prompt_completion",
        PROMPT,
    ),
]


def example_of(content: dict[str, Any], *renames: str, **options: Any) -> Any:
    row = Row(fields=content, where="a.jsonl, line 7")
    shape = detect_shape(row, fields=renames)
    return to_example(row, shape=shape, fields=renames, **options)


@pytest.mark.parametrize(("content", "fields", "shape", "expected"), SHAPES)
def test_shapes(
    content: dict[str, Any], fields: tuple[str, ...], shape: str, expected: list[Message]
) -> None:
    row = Row(fields=content, where="a.jsonl, line 1")
    assert detect_shape(row, fields=fields) == shape
    assert example_of(content, *fields) == Conversation(messages=expected)
    with_system = example_of(content, *fields, defaults=Defaults(system="Be kind.")).messages
    kept = [SYSTEM] if SYSTEM in expected else [{"role": "system", "content": "Be kind."}]
    assert with_system == kept + [message for message in expected if message != SYSTEM]


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ({"text": "Once."}, (), PlainText(completion="Once.")),
        ({"content": "Once.", "url": "a"}, (), PlainText(completion="Once.")),
        ({"body": "Once."}, ("text=body",), PlainText(completion="Once.")),
        (
            {"prompt": "1 + 1 =", "completion": " 2"},
            (),
            PlainText(prompt="1 + 1 =", completion=" 2"),
        ),
        ({"prompt": "[x", "completion": " 2"}, (), PlainText(prompt="[x", completion=" 2")),
        ({"prompt": "", "completion": "2"}, (), PlainText(completion="2")),
    ],
)
def test_plain_texts(content: dict[str, Any], fields: tuple[str, ...], expected: PlainText) -> None:
    assert example_of(content, *fields) == expected


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TURNS: list[tuple[dict[str, Any], Message]] = [
    ({"from": "system", "value": "a"}, {"role": "system", "content": "a"}),
    ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
    ({"role": "Human", "content": "a"}, user("a")),
    ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
    (
        {"role": "function", "name": "add", "content": "a"},
        {"role": "tool", "content": "a", "name": "add"},
    ),
    (
        {"role": "tool", "content": {"é": [1]}, "tool_call_id": "1"},
        {"role": "tool", "content": '{"é": [1]}', "tool_call_id": "1"},
    ),
    # Null fields are those that Arrow adds.
    ({"role": "user", "content": "a", "tool_calls": None, "name": None, "weight": None}, user("a")),
    # Content in parts.
    (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        user("abc"),
    ),
    (
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t"},
                {"type": "text", "text": "a", "image": None},
            ],
        },
        {**assistant("a"), "reasoning_content": "t"},
    ),
    # Reasoning, under its three names.
    (
        {"role": "assistant", "content": "a", "reasoning_content": "t"},
        {**assistant("a"), "reasoning_content": "t"},
    ),
    (
        {"role": "assistant", "reasoning": "t", "content": None},
        {**assistant(""), "reasoning_content": "t"},
    ),
    (
        {"role": "assistant", "thinking": "t", "content": "a"},
        {**assistant("a"), "reasoning_content": "t"},
    ),
    # Calls: of OpenAI, as JSON, flat, of OpenAI's older API, of ShareGPT.
    ({"role": "assistant", "tool_calls": [CALL]}, {**assistant(""), "tool_calls": [CALL]}),
    (
        {
            "role": "assistant",
            "content": "a",
            "tool_calls": [{"id": "7", "function": {"name": "add", "arguments": '{"x": 1}'}}],
        },
        {**assistant("a"), "tool_calls": [{"id": "7", **CALL}]},
    ),
    (
        {"role": "assistant", "tool_calls": '[{"name": "add", "arguments": {"x": 1}}]'},
        {**assistant(""), "tool_calls": [CALL]},
    ),
    (
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "add", "arguments": '{"x": 1}'},
        },
        {**assistant(""), "tool_calls": [CALL]},
    ),
    (
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
        {**assistant(""), "tool_calls": [CALL]},
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]},
        {
            **assistant(""),
            "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}],
        },
    ),
    # An explicit null is an argument of its own.
    (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]},
        {
            **assistant(""),
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
            ],
        },
    ),
    # Weights.
    ({"role": "assistant", "content": "a", "weight": 0}, {**assistant("a"), "train": False}),
    ({"role": "assistant", "content": "a", "weight": 1.0}, {**assistant("a"), "train": True}),
    ({"role": "assistant", "content": "a", "train": True}, {**assistant("a"), "train": True}),
    ({"role": "assistant", "content": "", "weight": 0}, {**assistant(""), "train": False}),
    ({"role": "assistant", "content": "a", "train": "False"}, {**assistant("a"), "train": False}),
    # What only some templates know.
    (
        {"role": "assistant", "content": "a", "tool_plan": "p"},
        {**assistant("a"), "tool_plan": "p"},
    ),
]


@pytest.mark.parametrize(("turn", "expected"), TURNS)
def test_turns(turn: dict[str, Any], expected: Message) -> None:
    conversation = example_of({"messages": [turn, assistant("end")]})
    assert conversation.messages == [expected, assistant("end")]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        ([TOOL["function"]], [TOOL]),
        ('[{"name": "add", "parameters": {"type": "object"}}]', [TOOL]),
        (['{"name": "add", "parameters": "{\\"type\\": \\"object\\"}"}'], [TOOL]),
        ([], None),
        ("", None),
        ("[]", None),
        (None, None),
    ],
)
def test_tools(tools: Any, expected: Any) -> None:
    row = {"messages": CONVERSATION, "tools": tools}
    assert example_of(row) == Conversation(messages=CONVERSATION, tools=expected)
    # The row's own tools come first.
    other = [{"type": "function", "function": {"name": "sub"}}]
    assert example_of(row, defaults=Defaults(tools=other)).tools == (expected or other)
    functions = {"messages": CONVERSATION, "functions": tools}
    assert example_of(functions).tools == expected


def test_documents_and_template_variables() -> None:
    documents = [{"title": "a", "text": "b"}]
    for given in (documents, '[{"title": "a", "text": "b"}]'):
        assert example_of({"messages": CONVERSATION, "documents": given}).documents == documents
    row = {"messages": CONVERSATION, "chat_template_kwargs": {"enable_thinking": True}}
    defaults = Defaults(template_args={"enable_thinking": False, "x": 1})
    assert example_of(row, defaults=defaults).template_args == {"enable_thinking": True, "x": 1}


def test_columns_that_are_not_used_are_counted() -> None:
    unused: Counter[str] = Counter()
    row = {"question": "a", "answer": "b", "id": 3, "source": None, "category": ""}
    example_of(row, unused=unused)
    example_of(row, unused=unused)
    options = Defaults(system="c", tools=[{"name": "d"}], template_args={"e": 1})
    example_of({"text": "a", "system": "b"}, unused=unused, defaults=options)
    not_for_text = {"--data.system": 1, "--data.tools": 1, "--data.template_args": 1}
    assert unused == {"column id": 2, "column system": 1, **not_for_text}


def test_rows_of_another_format_among_the_usual() -> None:
    """Arrow tables of several sources have nulls where another source has its columns."""

    def fits(**fields: Any) -> str:
        return fitting_shape(Row(fields=fields, where=""), usual="question_answer")

    assert fits(question="a", answer="b", messages=None) == "question_answer"
    assert fits(question=None, answer=None, messages=CONVERSATION) == "messages"
    # A row that lacks an answer is a mistake, not plain text.
    assert fits(question="a", answer=None, text="c") == "question_answer"


QA = {"question": "a", "answer": "b"}
MISTAKES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    (
        {"question": "a"},
        ("answer=solution",),
        "data.fields answer=solution: the row has no field 'solution'; it has question",
    ),
    (QA, ("awnser=b",), "did you mean 'answer'"),
    # Reversed renames, with the option that was meant.
    ({"Q": "a", "A": "b"}, ("Q=question",), "wrong way round.*--data.fields question=Q$"),
    (
        {"prompt": "a", "completion": "b"},
        ("prompt=question", "completion=answer"),
        "line 7: data.fields prompt=question is the wrong way round.*fields question=prompt$",
    ),
    (
        {"messages": [{"who": "user", "content": "a"}]},
        ("who=role",),
        "wrong way round.*--data.fields role=who$",
    ),
    (
        {"question": "a", "answer": 4},
        (),
        """line 7: answer is int, not text; write it as text, such as "4"$""",
    ),
    ({"question": "a", "answer": "\ud800"}, (), "answer contains an unpaired surrogate"),
    ({"prompt": "a", "solution": 4}, (), "line 7: solution is int, not text"),
    ({"messages": [user("a")]}, (), "line 7: the conversation has no assistant turn"),
    ({"messages": []}, (), "line 7: the conversation has no assistant turn"),
    ({"messages": "a"}, (), r"messages is text that is not JSON \('a'\); give JSON"),
    ({"messages": "{}"}, (), "messages is dict, not a list"),
    ({"messages": ["a"]}, (), "turn 1: a turn must be an object with role and content"),
    (
        {"messages": [user("a"), {"role": "assistant"}]},
        (),
        "line 7, turn 2: no field 'content'; it has role",
    ),
    (
        {"messages": [user("a"), {"role": "assistant", "content": None}]},
        (),
        "line 7, turn 2: content is null",
    ),
    (
        {"messages": [{"role": "user", "text": "a"}]},
        (),
        "turn 1: no field 'content'; it has role, text; .*--data.fields content=text",
    ),
    (
        {"messages": [{"role": "assistant", "content": [1]}]},
        (),
        r'turn 1, part 1 of the content: is int; .* list of parts such as {"type": "text"',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
        (),
        "turn 1, part 1 of the content: has the type 'image_url', and this trainer takes text only",
    ),
    (
        {"messages": [{"role": "user", "content": {"text": "a"}}]},
        (),
        "turn 1: content is an object; give text, or a list of parts",
    ),
    (
        {"messages": [{"role": "narrator", "content": "a"}]},
        (),
        "turn 1: unknown role 'narrator'; known: system",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        (),
        r"turn 1: weight is 0.5; a turn either counts in the loss \(1 or true\)",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "add 1"}]},
        (),
        "turn 1: function_call is text that is not JSON",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        (),
        "turn 1: the arguments of f are list, not an object",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        (),
        'turn 1: tool_calls has no function name; give {"name": "f"',
    ),
    (
        {"messages": CONVERSATION, "tools": [{"type": "web_search"}]},
        (),
        "line 7, tool 1 of tools: has no function with a name",
    ),
    ({"messages": CONVERSATION, "documents": ["a"]}, (), "item 1 of documents is text that is not"),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        (),
        "pair 1 of the history: must be a list of two texts",
    ),
    ({"prompt": "a", "completion": " "}, (), "line 7: the completion is empty"),
    (
        {"prompt": [user("a")], "completion": [{"role": "assistant", "content": [1]}]},
        (),
        "line 7, turn 1 of the completion, part 1",
    ),
    # Data for other trainers.
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        (),
        "line 7: a preference pair .prompt, chosen, rejected., as DPO takes it; this trainer takes "
        ".*--data.fields question=prompt answer=chosen$",
    ),
    (
        {"chosen": CONVERSATION, "rejected": CONVERSATION},
        (),
        "a preference pair .chosen, rejected., .*--data.fields messages=chosen$",
    ),
    (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("b")]},
        (),
        "a preference pair .*--data.fields completion=chosen$",
    ),
    (
        {"prompt": "a", "completion": "b", "label": True},
        (),
        "line 7: a completion with a label of good or bad .*as KTO takes it.*"
        "--data.shape prompt_completion to train on all",
    ),
    ({"prompt": "a", "completion": "b", "label": "False"}, (), "as KTO takes it"),
    ({"input_ids": [1], "labels": [1]}, (), "line 7: the row is tokenized already"),
    (user("a"), (), "line 7: the row is a single turn"),
    # Renames that would help.
    ({"Q": "a", "A": "b"}, (), "--data.fields, for example --data.fields question=Q answer=A"),
    (
        {"id": "x", "Question": "a", "Long_Answer": "b"},
        (),
        "with --data.fields question=Question answer=Long_Answer$",
    ),
    (
        {"prompt": [user("a")], "response": "b"},
        (),
        "with --data.fields completion=response$",
    ),
    ({"doc_id": "x", "body": "a"}, (), "for example --data.fields text=body"),
    ({"role": "prompter", "text": "a"}, (), "line 7: the row is a single turn"),
    ({"talk": CONVERSATION}, (), "with --data.fields messages=talk$"),
    ({"body": "a", "n": 1}, (), "for example --data.fields text=body"),
    ({"prompt": "a"}, (), "a prompt alone has nothing to train on"),
    (
        {"problem": "a", "solution": "b", "response": "c"},
        (),
        "response and solution could both be the answer; "
        "give --data.fields answer=response or --data.fields answer=solution",
    ),
]


@pytest.mark.parametrize(("content", "fields", "message"), MISTAKES)
def test_mistakes_name_the_place_and_the_way_out(
    content: dict[str, Any], fields: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        example_of(content, *fields)
    assert "\n" not in str(error.value)


def test_a_named_shape_says_which_field_is_missing() -> None:
    row = Row(fields={"question": "a", "anwser": "b"}, where="a.jsonl, line 7")
    with pytest.raises(ValueError, match=r"no field 'answer'; .*--data.fields answer=anwser"):
        to_example(row, shape="question_answer")
    # Nothing in the row could be the missing field.
    way_out = r"; complete or remove the row, or give another --data\.shape$"
    alone = Row(fields={"question": "a"}, where="")
    with pytest.raises(ValueError, match=r"no field 'answer'; it has question" + way_out):
        to_example(alone, shape="question_answer")
    with pytest.raises(
        ValueError, match=r"no field 'conversations'; it has question, anwser" + way_out
    ):
        to_example(row, shape="sharegpt")
    # It also settles what would be refused.
    labeled = Row(fields={"prompt": "a", "completion": "b", "label": True}, where="")
    expected = PlainText(prompt="a", completion="b")
    assert to_example(labeled, shape="prompt_completion") == expected


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(
        ValueError,
        match=r"the fields \(txt\) match no known shape; known: messages \(messages\); sharegpt",
    ):
        detect_shape(Row(fields={"txt": "a"}, where="a.jsonl, line 1"))


def test_split_answer_takes_the_last_turn() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert split_answer(messages) == (messages[:3], "d")
    call = {**assistant(""), "tool_calls": [CALL]}
    assert split_answer([*messages[:3], call]) == (messages[:1], "b")
    with pytest.raises(ValueError, match="no assistant turn with a text"):
        split_answer([user("a"), call])


def test_doctests() -> None:
    for module in (formats, shapes, fields_module):
        assert doctest.testmod(module).failed == 0


def test_the_rows_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs/DATA.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) == 11
    unused: Counter[str] = Counter()
    for row in rows:
        example_of(row, unused=unused)
    assert not unused
    for shape, required in shapes.REQUIRED.items():
        (line,) = re.findall(rf"^\| `{shape}` \| (`.*)$", text, re.MULTILINE)[:1]
        names = [*required, *(n for names in shapes.SYNONYMS[shape].values() for n in names)]
        assert all(f"`{name}`" in line for name in names)


def test_the_answer_to_a_multiple_choice_question_is_a_letter() -> None:
    fields = {"question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "4"}
    with pytest.raises(ValueError, match=r"row 1: the answer is '4'; it must be A, B, C or D"):
        to_example(Row(fields=fields, where="row 1"), shape="multiple_choice")
