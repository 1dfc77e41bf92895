"""Converts one turn of a conversation to a message, whatever names and forms it uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorax_ft.data.conversation import Message
from lorax_ft.data.fields import TURN_SYNONYMS, Fields, check_text, parse_json, type_name
from lorax_ft.data.tools import tool_calls_of

# What data sets call the roles of chat templates.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Turns of ShareGPT whose content is the JSON of a call.
CALL_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


def to_message(turn: Any, *, renames: Mapping[str, str], where: str) -> Message:
    """Converts a turn to a message.

    Args:
      turn: an object with role and content, or from and value.
      renames: actual names of the turn's fields by expected names.
      where: the turn's place, for errors.

    Raises:
      ValueError: the turn is no such object, or one of its fields has an unknown form.
    """
    if not isinstance(turn, dict):
        raise ValueError(
            f"{where}: a turn must be an object with role and content (or from and value), "
            f"not {type_name(turn)}"
        )
    fields = Fields(turn, where, renames=renames, synonyms=TURN_SYNONYMS)
    role = fields.text("role")
    if role.lower() in CALL_ROLES:
        calls = tool_calls_of(fields.require("content"), role, where)
        message: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    else:
        message = _spoken(fields, role)
    _add_calls(message, fields)
    _add_train(message, fields)
    # What templates know besides: tool_call_id, name, and the fields of single model families.
    for name, value in turn.items():
        if value is not None and name not in fields.used:
            message.setdefault(name, value)
    return message


def is_blank(message: Message) -> bool:
    """Whether a message says, thinks and calls nothing."""
    said = [message["content"], message.get("reasoning_content", "")]
    return not message.get("tool_calls") and not any(text.strip() for text in said)


def _spoken(fields: Fields, role: str) -> Message:
    """The role, content and reasoning of a turn."""
    where = fields.where
    known_role = ROLES.get(role.lower())
    if known_role is None:
        known = ", ".join([*ROLES, *CALL_ROLES])
        raise ValueError(f"{where}: unknown role {role!r}; known: {known}")
    reasoning = fields.optional_text("reasoning_content")
    # The content of an answer may be null or absent beside a tool call or a thought.
    has_other = (
        bool(reasoning) or bool(fields.find("tool_calls")) or "function_call" in fields.values
    )
    content = fields.get("content") if has_other else fields.require("content")
    thoughts = ""
    if isinstance(content, list):
        content, thoughts = _join_parts(content, where)
    elif known_role == "tool" and content is not None and not isinstance(content, str):
        # A tool's result, as the JSON that the model will be shown when it is used.
        content = json.dumps(content, ensure_ascii=False)
    elif isinstance(content, dict):
        raise ValueError(f"{where}: content is an object; give text, or a list of {_PART_EXAMPLE}")
    message = {"role": known_role, "content": ""}
    if content is not None:
        message["content"] = check_text(content, fields.find("content") or "content", where)
    if reasoning or thoughts:
        message["reasoning_content"] = reasoning or thoughts
    return message


_PART_EXAMPLE = 'parts such as {"type": "text", "text": "..."}'


def _join_parts(parts: list[Any], where: str) -> tuple[str, str]:
    """The text and the reasoning of a content that is a list of parts."""
    texts = []
    thoughts = []
    for number, part in enumerate(parts, 1):
        place = f"{where}, part {number} of the content"
        if isinstance(part, str):
            texts.append(check_text(part, "the part", place))
            continue
        if not isinstance(part, dict):
            raise ValueError(
                f"{place}: is {type_name(part)}; content must be text, or a list of {_PART_EXAMPLE}"
            )
        kind = part.get("type", "text")
        if kind in _TEXT_PARTS:
            texts.append(check_text(part.get("text"), "text", place))
        elif kind in _REASONING_PARTS:
            thoughts.append(_thought(part, kind, place))
        else:
            raise ValueError(
                f"{place}: has the type {kind!r}, and this trainer takes text only; "
                f"remove it, or give {_PART_EXAMPLE}"
            )
    return "".join(texts), "".join(thoughts)


def _thought(part: Mapping[str, Any], kind: str, place: str) -> str:
    """The text of a part that holds reasoning, under its type's name or as text."""
    value = part.get(kind)
    if value is None:
        value = part.get("text")
    return check_text(value, kind, place)


def _add_calls(message: Message, fields: Fields) -> None:
    """Adds the tool calls of a turn: a list, or the single function_call of OpenAI's older API."""
    calls = fields.get("tool_calls")
    if calls:
        message["tool_calls"] = tool_calls_of(calls, "tool_calls", fields.where)
    if "function_call" in fields.values:
        fields.used.add("function_call")
        call = fields.values["function_call"]
        if call is not None:
            message["tool_calls"] = tool_calls_of(call, "function_call", fields.where)


def _add_train(message: Message, fields: Fields) -> None:
    """Adds whether the turn's tokens count: from `train`, or from OpenAI's `weight`, 0 or 1."""
    name = fields.find("train")
    if name is None:
        return
    value = fields.get("train")
    if isinstance(value, str):  # from a CSV file, or an Arrow column of text
        value = parse_json(value.lower(), name, fields.where)
    # True and False are 1 and 0 too.
    if value not in (0, 1):
        raise ValueError(
            f"{fields.where}: {name} is {value!r}; a turn either counts in the loss (1 or true) "
            "or does not (0 or false)"
        )
    message["train"] = bool(value)
