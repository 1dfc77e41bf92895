"""Conversations from rows: the shapes in which instruction data is written, and one list of messages out of each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lorax_ft.data.sources import Row

Shape = Literal["messages", "alpaca", "sharegpt", "question_answer"]
Message = dict[str, str]
"""One turn: its "role" (system, user or assistant) and its "content"."""

_REQUIRED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}
_OPTIONAL = ("input", "system", "history")
_IN_TURNS = ("role", "content", "from", "value")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def detect_shape(row: Row, *, fields: Sequence[str] = ()) -> Shape:
    """The first shape whose required fields the row has, under the renames in `fields`.

    Raises:
      ValueError: it is none of them.

    >>> detect_shape(Row(fields={"question": "1 + 1?", "solution": "2"}, where=""), fields=["answer=solution"])
    'question_answer'
    """
    renames = _renames(fields)
    for name, actual in renames.items():
        if actual not in row.fields and name not in _IN_TURNS:
            raise ValueError(
                f"{row.where}: data.fields {name}={actual}: no field {actual!r}; it has {_names(row.fields)}"
            )
    for shape, needed in _REQUIRED.items():
        if all(renames.get(name, name) in row.fields for name in needed):
            return shape
    shapes = "; ".join(f"{shape} ({', '.join(needed)})" for shape, needed in _REQUIRED.items())
    raise ValueError(
        f"{row.where}: its fields ({_names(row.fields)}) fit no shape; known: {shapes}; "
        "rename fields with --data.fields, such as question=prompt"
    )


def to_messages(
    row: Row, *, shape: Shape, fields: Sequence[str] = (), system: str | None = None
) -> list[Message]:
    """The conversation that a row holds.

    Args:
      row: the row.
      shape: messages (a list of role and content), sharegpt (`conversations`, a list of from and value; system),
        alpaca (instruction, input, output, system, history as pairs of user and assistant) or question_answer.
      fields: renames, each as "expected=actual"; those of role, content, from and value hold for every turn.
      system: a system message for a conversation that has none.

    Raises:
      ValueError: a field is missing or not text, a role is unknown, or no turn is the assistant's; with the place.

    >>> to_messages(Row(fields={"question": "1 + 1?", "answer": "2"}, where=""), shape="question_answer")
    [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'}]
    """
    renames = _renames(fields)
    in_turns = {name: actual for name, actual in renames.items() if name in _IN_TURNS}
    in_row = {name: actual for name, actual in renames.items() if name not in _IN_TURNS}
    renamed = _renamed(row.fields, in_row, row.where)
    if shape == "messages":
        messages = _turns(renamed, "messages", in_turns, row.where, role="role", content="content")
    elif shape == "sharegpt":
        messages = _turns(
            renamed, "conversations", in_turns, row.where, role="from", content="value"
        )
        messages = _with_system(messages, _optional(renamed, "system", row.where))
    elif shape == "alpaca":
        messages = _alpaca(renamed, row.where)
    else:
        question, answer = (_text(renamed, name, row.where) for name in _REQUIRED[shape])
        messages = [_message("user", question), _message("assistant", answer)]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{row.where}: no turn is the assistant's, so there is nothing to learn; remove or complete it"
        )
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(
                f"{row.where}: the assistant's text (turn {number}) is empty; remove or complete it"
            )
    return _with_system(messages, system)


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """What stands before the last assistant turn, and that turn's content: a question and its reference answer."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last]), messages[last]["content"]


def _alpaca(fields: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    for number, pair in enumerate(
        _list(fields, "history", where) if fields.get("history") else [], 1
    ):
        place = f"{where}, pair {number} of the history"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{place}: not a list of two, the user's text and the assistant's")
        turn = {"user": pair[0], "assistant": pair[1]}
        messages += [_message(role, _text(turn, role, place)) for role in turn]
    question = [_text(fields, "instruction", where), _optional(fields, "input", where)]
    messages.append(_message("user", "\n".join(filter(None, question))))
    messages.append(_message("assistant", _text(fields, "output", where)))
    return _with_system(messages, _optional(fields, "system", where))


def _turns(
    fields: Mapping[str, Any],
    name: str,
    renames: Mapping[str, str],
    where: str,
    *,
    role: str,
    content: str,
) -> list[Message]:
    messages = []
    for number, turn in enumerate(_list(fields, name, where), 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(
                f"{place}: a turn must be an object with {role} and {content}, not {type(turn).__name__}"
            )
        turn = _renamed(turn, renames, place)
        speaker = _text(turn, role, place)
        if speaker not in _ROLES:
            raise ValueError(f"{place}: unknown role {speaker!r}; known: {', '.join(_ROLES)}")
        messages.append(_message(_ROLES[speaker], _text(turn, content, place)))
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    has_one = bool(messages) and messages[0]["role"] == "system"
    return [_message("system", system), *messages] if system and not has_one else messages


def _value(fields: Mapping[str, Any], name: str, where: str, *, wanted: str = "") -> Any:
    if name not in fields:
        near = difflib.get_close_matches(name, list(fields), n=1)
        raise ValueError(
            f"{where}: no field {name!r}; it has {_names(fields)}; "
            f"name the right one with --data.fields {wanted or name}={near[0] if near else 'NAME'}"
        )
    return fields[name]


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = _value(fields, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half of a surrogate pair, which is no text"
        ) from error
    return value


def _optional(fields: Mapping[str, Any], name: str, where: str) -> str:
    return "" if fields.get(name) is None else _text(fields, name, where)


def _list(fields: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = _value(fields, name, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} is {type(value).__name__}, not a list")
    return value


def _renames(fields: Sequence[str]) -> dict[str, str]:
    known = [*(name for names in _REQUIRED.values() for name in names), *_OPTIONAL, *_IN_TURNS]
    renames = dict(entry.split("=", 1) for entry in fields)
    for name in renames:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"data.fields: no shape expects a field {name!r}; {hint}")
    return renames


def _renamed(
    fields: Mapping[str, Any], renames: Mapping[str, str], where: str
) -> Mapping[str, Any]:
    """The fields with each expected name holding the actual field's value."""
    return {
        **fields,
        **{name: _value(fields, actual, where, wanted=name) for name, actual in renames.items()},
    }


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "none"
