"""What scripts ask a model: conversations from a file, with tools and template variables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_ft.data.conversation import Conversation, Message


def parse_template_args(entries: Sequence[str]) -> dict[str, Any]:
    """Parses variables of the chat template, each "name=value"; a value that is no JSON is text.

    Raises:
      ValueError: an entry has another form.

    >>> parse_template_args(["enable_thinking=false", "reasoning_effort=low"])
    {'enable_thinking': False, 'reasoning_effort': 'low'}
    """
    parsed: dict[str, Any] = {}
    for entry in entries:
        if re.fullmatch(r"\w+=.+", entry) is None:
            raise ValueError(f'template_args: {entry!r} is not of the form "name=value"')
        name, text = entry.split("=", 1)
        # As Python writes them.
        literal = {"True": "true", "False": "false", "None": "null"}.get(text, text)
        try:
            parsed[name] = json.loads(literal)
        except ValueError:
            parsed[name] = text
    return parsed


def read_tools(file: str | None) -> list[dict[str, Any]] | None:
    """Reads the JSON schemas of tools; None without a file.

    Raises:
      ValueError: the file cannot be read, or it is not a list of objects.
    """
    if file is None:
        return None
    try:
        tools = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--tools {file} cannot be read as JSON: {error}") from error
    _check_objects(tools, f"--tools {file}", "tool schemas")
    return list(tools)


def read_questions(file: Path, asked: Conversation) -> dict[str, Conversation]:
    """Reads the conversations of a file, by file and line number.

    A line is a question, or a JSON object with "messages" and perhaps "tools". In a .jsonl file,
    every line is such an object, or one with a "question".

    Args:
      file: the text file.
      asked: the system message, tools and template variables of all lines that have none.

    Raises:
      ValueError: there is no such file, it is empty or not UTF-8, or a line is damaged.
    """
    if not file.is_file():
        raise ValueError(f"there is no file at {file}")
    try:
        # -sig, as editors on Windows start a file with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    questions = {}
    # Not splitlines(), which also splits at form feeds and U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            is_json = file.suffix == ".jsonl"
            questions[place] = _conversation(line.strip(), asked, place, is_json=is_json)
    if not questions:
        raise ValueError(f"{file} contains no questions")
    return questions


def ask(asked: Conversation, messages: Sequence[Message]) -> Conversation:
    """Returns the conversation `asked`, continued by messages.

    A system message among them replaces that of `asked`.
    """
    before = asked.messages
    if messages[0]["role"] in ("system", "developer"):
        before = []
    return Conversation(
        messages=[*before, *messages],
        tools=asked.tools,
        documents=asked.documents,
        template_args=asked.template_args,
    )


def _conversation(line: str, asked: Conversation, place: str, *, is_json: bool) -> Conversation:
    """Converts a line of a file."""
    fields = _fields(line, place, is_json=is_json)
    if fields is None:
        return ask(asked, [{"role": "user", "content": line}])
    if "messages" not in fields and isinstance(fields.get("question"), str):
        return ask(asked, [{"role": "user", "content": fields["question"]}])
    messages = _messages(fields.get("messages"), place)
    conversation = ask(asked, messages)
    if fields.get("tools") is None:
        return conversation
    _check_objects(fields["tools"], f"{place}: tools", "tool schemas")
    return Conversation(
        messages=conversation.messages,
        tools=fields["tools"],
        template_args=conversation.template_args,
    )


def _fields(line: str, place: str, *, is_json: bool) -> dict[str, Any] | None:
    """Returns the JSON object of a line; None if the line is a question."""
    try:
        value = json.loads(line)
    except ValueError as error:
        # A question may start with a brace; this is a conversation that was cut off.
        if is_json or re.match(r'\{\s*"messages"', line):
            raise ValueError(f"{place} is not JSON: {error}") from error
        return None
    if isinstance(value, dict) and (is_json or "messages" in value):
        return value
    if is_json:
        raise ValueError(f'{place}: must be a JSON object with "messages" or "question"')
    return None


def _messages(value: Any, place: str) -> list[Message]:
    """Checks the messages of a line, and removes fields that are null."""
    _check_objects(value, f"{place}: messages", "messages")
    messages = []
    for number, given in enumerate(value, 1):
        if not isinstance(given.get("role"), str):
            raise ValueError(f"{place}, message {number}: role must be a text, such as user")
        message = {name: field for name, field in given.items() if field is not None}
        message.setdefault("content", "")
        if "tool_calls" in message:
            where = f"{place}, message {number}: tool_calls"
            _check_objects(message["tool_calls"], where, "tool calls")
            message["tool_calls"] = [_parsed_call(call) for call in message["tool_calls"]]
        messages.append(message)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{place}: the last message is the assistant's, so there is nothing to answer; "
            "remove it"
        )
    return messages


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a call with its arguments as an object; OpenAI's API writes them as JSON text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": {**function, "arguments": arguments}}


def _check_objects(value: Any, place: str, what: str) -> None:
    """Raises a `ValueError` if a value is not a list with JSON objects."""
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{place}: must be a list of {what}, each a JSON object")
