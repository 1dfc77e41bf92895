"""The parts of an answer, and what scripts ask: reasoning, tool calls, files of conversations."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from lorax_ft.checks import parse_template_args
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.tools import read_tools
from lorax_ft.inference.questions import read_questions, warn_unused
from lorax_ft.inference.turns import (
    assistant_message,
    describe_call,
    opened_reasoning,
    split_reasoning,
    thinking_variable,
)
from lorax_ft.run.model_args import ChatArgs

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
GPT_OSS = "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>42"
ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("42\n", {"content": "42"}),
    "thoughts": (
        "\n<think>\nso\n</think>\n\n42",
        {"content": "42", "reasoning_content": "so"},
    ),
    "an empty thought": ("<think>\n\n</think>\n\n42", {"content": "42"}),
    "an unfinished thought": ("<think>so", {"content": "", "reasoning_content": "so"}),
    "gpt-oss": (GPT_OSS, {"content": "42", "reasoning_content": "so"}),
    "gpt-oss without analysis": ("<|channel|>final<|message|>42", {"content": "42"}),
    "cohere": (
        "<|START_THINKING|>so<|END_THINKING|><|START_RESPONSE|>42",
        {"content": "42", "reasoning_content": "so"},
    ),
    "the word in the text": ("I <think> so", {"content": "I <think> so"}),
    "a call that is not JSON": (
        "<tool_call>{weather}</tool_call>",
        {"content": "<tool_call>{weather}</tool_call>"},
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_assistant_message(name: str) -> None:
    text, message = ANSWERS[name]
    assert assistant_message(text) == {"role": "assistant", **message}


def test_reasoning_that_the_prompt_opened() -> None:
    opened = opened_reasoning("<|im_start|>assistant\n<think>\n")
    message = assistant_message("so\n</think>\n\n42", opened=opened)
    assert message == {"role": "assistant", "content": "42", "reasoning_content": "so"}
    assert opened_reasoning("<|im_start|>assistant\n") is None
    assert opened_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None


@pytest.mark.parametrize("text", [GPT_OSS, "<think>a</think>b", "<b>42</b>", "<"])
def test_streamed_parts_only_grow(text: str) -> None:
    before = ("", "")
    for end in range(len(text) + 1):
        parts = split_reasoning(text[:end], complete=False)
        assert parts[0].startswith(before[0])
        assert parts[1].startswith(before[1])
        before = parts
    assert "".join(split_reasoning(text)) == text


def test_tool_calls() -> None:
    call = (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
    )
    message = assistant_message(f"I look.\n{call}\n{call}")
    assert message["content"] == "I look."
    function = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
    assert message["tool_calls"] == [{"type": "function", "function": function}] * 2
    assert describe_call(message["tool_calls"][0]) == 'weather(city="Köln", days=2)'


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (
            "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}",
            "enable_thinking",
        ),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", "thinking"),
        ("{% generation %}{{ message.thinking }}{% endgeneration %} thinking", None),
        ({"default": "", "tool_use": "{{ enable_thinking }}"}, "enable_thinking"),
        ("{% if %}", None),
        (None, None),
    ],
)
def test_thinking_variable(template: Any, name: str | None) -> None:
    assert thinking_variable(template) == name


def test_parse_template_args() -> None:
    parsed = parse_template_args(
        ["a=false", "b=True", "c=low", "d=[1]", "e=x=y"], "--template_args"
    )
    assert parsed == {"a": False, "b": True, "c": "low", "d": [1], "e": "x=y"}
    with pytest.raises(ValueError, match="'a' is not of the form \"name=value\""):
        ChatArgs(model="m", template_args=("a",))


def test_the_opening_of_conversations(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL]))
    args = ChatArgs(model="m", system="Be brief.", tools=str(file), template_args=("a=1",))
    system = {"role": "system", "content": "Be brief."}
    assert args.opening() == Conversation(messages=[system], tools=[TOOL], template_args={"a": 1})
    for text, message in (
        ("{}", "has no function with a name"),
        ("[", "cannot be read as JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tools(str(file), "--tools")


def test_a_file_of_questions_and_conversations(tmp_path: Path) -> None:
    user = {"role": "user", "content": "hi"}
    called = {"name": "weather", "arguments": {"city": "Rome"}}
    as_text = {"type": "function", "function": {**called, "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "system", "content": "Mine."},
        user,
        {"role": "assistant", "content": None, "tool_calls": [as_text]},
        {"role": "tool", "content": "sunny", "name": None},
    ]
    file = tmp_path / "questions.txt"
    lines = ["hi", "", json.dumps({"messages": turns, "tools": [TOOL]}), '{"is": "JSON"}?']
    file.write_text("\n".join(lines))
    system = {"role": "system", "content": "Ours."}
    asked = Conversation(messages=[system], template_args={"a": 1})
    read = read_questions(file, asked)
    assert [*read] == [f"{file}, line {number}" for number in (1, 3, 4)]
    first, second, third = read.values()
    assert first == Conversation(messages=[system, user], template_args={"a": 1})
    assert second.messages[2]["tool_calls"] == [{"type": "function", "function": called}]
    assert second.messages[2]["content"] == ""
    assert second.messages[3] == {"role": "tool", "content": "sunny"}
    assert second.messages[0] == turns[0]
    assert (second.tools, second.template_args) == ([TOOL], {"a": 1})
    assert third.messages[1]["content"] == '{"is": "JSON"}?'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 2 is not JSON"),
        ('{"messages": []}', "line 2: messages: must be a list of messages, each a JSON object"),
        ('{"messages": ["hi"]}', "line 2: messages: must be a list of messages"),
        ('{"messages": [{"content": "hi"}]}', "line 2, message 1: role must be a text"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
            "line 2: the last message is the assistant's",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": {}}',
            "line 2, tool 1 of tools: has no function with a name",
        ),
    ],
)
def test_damaged_lines(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "questions.txt"
    file.write_text(f"hi\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_questions(file, Conversation(messages=[]))


def test_lines_of_a_jsonl_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "hi", "answer": "ho"}\n')
    (read,) = read_questions(file, Conversation(messages=[])).values()
    assert read.messages == [{"role": "user", "content": "hi"}]
    for line, message in (("hi", "is not JSON"), ("[]", "must be a JSON object with")):
        file.write_text(line)
        with pytest.raises(ValueError, match=f"line 1:? {message}"):
            read_questions(file, Conversation(messages=[]))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet", "a.jsonl.gz"])
def test_tables_are_not_files_of_questions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("question,answer\na,b\n")
    with pytest.raises(ValueError, match=f"{name} is no text file with a question a line"):
        read_questions(tmp_path / name, Conversation(messages=[]))


def test_what_the_template_does_not_read_is_named() -> None:
    tokenizer: Any = types.SimpleNamespace(chat_template="{{ messages }}{{ enable_thinking }}")
    args = {"enable_thinking": False, "effort": "low"}
    opening = Conversation(messages=[], tools=[TOOL], template_args=args)
    unread = r"tools \(not in the chat template\), template variable effort \(not in the chat"
    with pytest.warns(UserWarning, match=f"^not used: {unread}"):
        warn_unused([opening, opening], tokenizer)
    warn_unused([Conversation(messages=[])], tokenizer)
    warn_unused([opening], None)
