"""What scripts ask a model: conversations from a file, with tools and template variables."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorax_ft.data.chat import Tokenizer
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.data.tools import tool_calls_of, tool_schemas
from lorax_ft.data.usage import optional_fields, unknown_fields

# Files whose lines are not questions.
_TABLES = (".csv", ".json", ".parquet", ".gz", ".zst")


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
    if file.suffix.lower() in _TABLES:
        raise ValueError(
            f"{file} is no text file with a question a line; give such a file, or a .jsonl file "
            'with lines {"question": "..."} or {"messages": [...]}'
        )
    try:
        # -sig, as editors on Windows start a file with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    questions = {}
    # Not splitlines(), which also splits at form feeds and U+2028.
    lines = text.split("\n")
    is_json = file.suffix == ".jsonl"
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            questions[place] = _conversation(line.strip(), asked, place, is_json=is_json)
    if not questions:
        raise ValueError(f"{file} contains no questions")
    return questions


def warn_unused(conversations: Iterable[Conversation], tokenizer: Tokenizer | None) -> None:
    """Warns of tools, documents, fields and variables that the chat template does not read."""
    if tokenizer is None:  # an error as soon as something is asked
        return
    counts: Counter[tuple[str, str]] = Counter()
    for conversation in conversations:
        counts.update(optional_fields(conversation))
    unused = unknown_fields(counts, tokenizer)
    if unused:
        warnings.warn(f"not used: {', '.join(unused)}", stacklevel=2)


def ask(asked: Conversation, messages: Sequence[Message]) -> Conversation:
    """Returns the conversation `asked`, continued by messages.

    A system message among them replaces that of `asked`.
    """
    before = asked.messages
    if messages[0]["role"] in ("system", "developer"):
        before = []
    return dataclasses.replace(asked, messages=[*before, *messages])


def _conversation(line: str, asked: Conversation, place: str, *, is_json: bool) -> Conversation:
    """Converts a line of a file."""
    fields = _fields(line, place, is_json=is_json)
    if fields is None:
        return _ask_text(asked, line)
    question = fields.get("question")
    if "messages" not in fields and isinstance(question, str):
        return _ask_text(asked, question)
    messages = _messages(fields.get("messages"), place)
    conversation = ask(asked, messages)
    given_tools = fields.get("tools")
    if given_tools is None:
        return conversation
    tools = tool_schemas(given_tools, "tools", place)
    return dataclasses.replace(conversation, tools=tools)


def _ask_text(asked: Conversation, question: str) -> Conversation:
    """The conversation `asked`, continued by a question of the user."""
    message = {"role": "user", "content": question}
    return ask(asked, [message])


def _fields(line: str, place: str, *, is_json: bool) -> dict[str, Any] | None:
    """Returns the JSON object of a line; None if the line is a question."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
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
        where = f"{place}, message {number}"
        if not isinstance(given.get("role"), str):
            raise ValueError(f"{where}: role must be a text, such as user")
        message = {name: field for name, field in given.items() if field is not None}
        # Templates expect a text beside tool calls.
        message.setdefault("content", "")
        calls = message.get("tool_calls")
        if calls is not None:
            message["tool_calls"] = tool_calls_of(calls, "tool_calls", where)
        messages.append(message)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{place}: the last message is the assistant's, so there is nothing to answer; "
            "remove it"
        )
    return messages


def _check_objects(value: Any, place: str, what: str) -> None:
    """Raises a `ValueError` if a value is not a list with JSON objects."""
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{place}: must be a list of {what}, each a JSON object")
