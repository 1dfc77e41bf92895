"""Converts dataset rows of the supported formats to conversations, each a list of messages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lorax_ft.data.sources import Row

Shape = Literal["messages", "alpaca", "sharegpt", "question_answer"]
"""The format of a row, as `data.shape` names it."""
Message = dict[str, str]
"""One turn: its "role" (system, user or assistant) and its "content"."""

# The order matters: a row may match several formats, and `detect_shape` takes the first.
_REQUIRED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}
_OPTIONAL = ("input", "system", "history")
# These fields belong to a turn inside the list of messages, not to the row itself.
_TURN_FIELDS = ("role", "content", "from", "value")
# Chat templates know system, user and assistant only; ShareGPT writes human and gpt instead.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class _Renames(NamedTuple):
    """Actual field names by the names that the format expects."""

    row: dict[str, str]
    turn: dict[str, str]


def detect_shape(row: Row, *, fields: Sequence[str] = ()) -> Shape:
    """Returns the first format whose required fields the row has, after the renames in `fields`.

    Raises:
      ValueError: the row matches no format, or a rename refers to a field that the row lacks.

    >>> row = Row(fields={"question": "1 + 1?", "solution": "2"}, where="")
    >>> detect_shape(row, fields=["answer=solution"])
    'question_answer'
    """
    renames = _parse_renames(fields).row
    # A wrong rename gets its own error. The one below would only say that no format matches.
    for name, actual in renames.items():
        if actual not in row.fields:
            raise ValueError(
                f"{row.where}: data.fields {name}={actual}: the row has no field {actual!r}; "
                f"it has {_names(row.fields)}"
            )
    for shape, required in _REQUIRED.items():
        if all(renames.get(name, name) in row.fields for name in required):
            return shape
    known = "; ".join(f"{shape} ({', '.join(required)})" for shape, required in _REQUIRED.items())
    raise ValueError(
        f"{row.where}: the fields ({_names(row.fields)}) match no known shape; known: {known}; "
        "rename fields with --data.fields, for example question=prompt"
    )


def to_messages(
    row: Row, *, shape: Shape, fields: Sequence[str] = (), system: str | None = None
) -> list[Message]:
    """Converts a row to a conversation.

    Args:
      row: the row.
      shape: messages (a list of turns with role and content), sharegpt (`conversations`, a list
        of turns with from and value; system), alpaca (instruction, input, output, system, and
        history as pairs of user and assistant texts) or question_answer.
      fields: renames, each as "expected=actual"; renames of role, content, from and value apply
        to every turn.
      system: system message for a conversation that has none.

    Raises:
      ValueError: a field is missing or not text, a role is unknown, or the conversation has no
        assistant turn or an empty one. The message names the row.

    >>> row = Row(fields={"question": "1 + 1?", "answer": "2"}, where="")
    >>> to_messages(row, shape="question_answer")
    [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'}]
    """
    where = row.where
    renames = _parse_renames(fields)
    renamed = _rename(row.fields, renames.row, where)
    match shape:
        case "messages":
            turns = _list(renamed, "messages", where)
            messages = _convert_turns(turns, "role", "content", renames.turn, where)
        case "sharegpt":
            turns = _list(renamed, "conversations", where)
            messages = _convert_turns(turns, "from", "value", renames.turn, where)
            messages = _with_system(messages, _optional_text(renamed, "system", where))
        case "alpaca":
            messages = _convert_alpaca(renamed, where)
        case "question_answer":
            question = _text(renamed, "question", where)
            answer = _text(renamed, "answer", where)
            messages = [_message("user", question), _message("assistant", answer)]
    _check_answers(messages, where)
    return _with_system(messages, system)


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Returns the messages before the last assistant turn, and the content of that turn."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last]), messages[last]["content"]


def _convert_alpaca(fields: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    history = []
    # Rows without a history often have null or an empty string there.
    if fields.get("history"):
        history = _list(fields, "history", where)
    for number, pair in enumerate(history, 1):
        place = f"{where}, pair {number} of the history"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{place}: must be a list of two texts, the user's and the assistant's"
            )
        turn = {"user": pair[0], "assistant": pair[1]}
        messages.append(_message("user", _text(turn, "user", place)))
        messages.append(_message("assistant", _text(turn, "assistant", place)))
    prompt = _text(fields, "instruction", where)
    context = _optional_text(fields, "input", where)
    # An empty instruction or input must not leave a stray line break in the prompt.
    messages.append(_message("user", "\n".join(filter(None, [prompt, context]))))
    messages.append(_message("assistant", _text(fields, "output", where)))
    return _with_system(messages, _optional_text(fields, "system", where))


def _convert_turns(
    turns: Sequence[Any],
    role_field: str,
    content_field: str,
    renames: Mapping[str, str],
    where: str,
) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(
                f"{place}: a turn must be an object with {role_field} and {content_field}, "
                f"not {type(turn).__name__}"
            )
        renamed = _rename(turn, renames, place)
        role = _text(renamed, role_field, place)
        if role not in _ROLES:
            raise ValueError(f"{place}: unknown role {role!r}; known: {', '.join(_ROLES)}")
        messages.append(_message(_ROLES[role], _text(renamed, content_field, place)))
    return messages


def _check_answers(messages: Sequence[Message], where: str) -> None:
    has_answer = False
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        has_answer = True
        # An empty answer would teach the model to end its turn at once.
        if not message["content"].strip():
            raise ValueError(
                f"{where}: the assistant's text (turn {number}) is empty; remove or complete it"
            )
    if not has_answer:
        raise ValueError(
            f"{where}: the conversation has no assistant turn, so there is nothing to train on; "
            "remove or complete it"
        )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Adds a system message at the front, unless the conversation has one or `system` is empty."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    if has_system or not system:
        return messages
    return [_message("system", system), *messages]


def _value(fields: Mapping[str, Any], name: str, where: str, *, expected: str = "") -> Any:
    """Returns a field's value; `expected` is the name that a renamed field has in the format."""
    if name not in fields:
        # The error proposes a complete option, with the closest field name if there is one.
        near = difflib.get_close_matches(name, list(fields), n=1)
        proposal = near[0] if near else "NAME"
        raise ValueError(
            f"{where}: no field {name!r}; it has {_names(fields)}; "
            f"name the right one with --data.fields {expected or name}={proposal}"
        )
    return fields[name]


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = _value(fields, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type(value).__name__}, not text")
    try:
        # JSON can escape half of a surrogate pair ("\ud800"), which the tokenizer would reject
        # much later, without the place.
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} contains an unpaired surrogate, which is not valid Unicode text"
        ) from error
    return value


def _optional_text(fields: Mapping[str, Any], name: str, where: str) -> str:
    # Parquet and JSON files write null where a row has no value for an optional field.
    if fields.get(name) is None:
        return ""
    return _text(fields, name, where)


def _list(fields: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = _value(fields, name, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} is {type(value).__name__}, not a list")
    return value


def _parse_renames(entries: Sequence[str]) -> _Renames:
    """Parses the "expected=actual" entries of `data.fields`."""
    known = [*_OPTIONAL, *_TURN_FIELDS]
    for required in _REQUIRED.values():
        known.extend(required)
    renames = _Renames(row={}, turn={})
    for entry in entries:
        name, actual = entry.split("=", 1)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"known: {', '.join(known)}"
            if near:
                hint = f"did you mean {near[0]!r}?"
            raise ValueError(f"data.fields: no shape has a field {name!r}; {hint}")
        if name in _TURN_FIELDS:
            renames.turn[name] = actual
        else:
            renames.row[name] = actual
    return renames


def _rename(fields: Mapping[str, Any], renames: Mapping[str, str], where: str) -> dict[str, Any]:
    """Returns the fields, with the values of the actual fields under the expected names too."""
    renamed = dict(fields)
    for name, actual in renames.items():
        # Read from `fields`, not `renamed`: two renames may swap two fields.
        renamed[name] = _value(fields, actual, where, expected=name)
    return renamed


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "none"
