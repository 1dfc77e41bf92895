"""Refuses rows that are for another kind of training, or in no known format, with the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.data.fields import list_names
from lorax_ft.data.rows import Row

# What columns of prompts and answers are called, alone or as parts of a name.
QUESTION_WORDS = ("question", "prompt", "instruction", "query", "problem", "input", "user", "human")
ANSWER_WORDS = ("answer", "response", "solution", "output", "completion", "assistant", "reply")
# Columns about a row rather than of its text.
_LABEL_WORDS = r"(^|_)(id|uuid|source|lang|language|category|type|url|date|split)$"
_TAKES = "this trainer takes conversations, prompts with completions, and plain text"


def refuse_preference(row: Row) -> None:
    """Raise for a preference pair, as DPO and reward models take it.

    Raises:
      ValueError: the row has a chosen and a rejected answer.
    """
    fields = row.fields
    if fields.get("chosen") is None or fields.get("rejected") is None:
        return
    has_prompt = fields.get("prompt") is not None
    names = "prompt, chosen, rejected" if has_prompt else "chosen, rejected"
    if not isinstance(fields["chosen"], str):
        # Two answers in the form of messages: with their prompt inside, or beside them.
        begins_with_answer = _first_role(fields["chosen"]) == "assistant"
        option = "messages=chosen"
        if has_prompt and begins_with_answer:
            option = "completion=chosen"
    else:
        option = "question=prompt answer=chosen" if has_prompt else "text=chosen"
    raise ValueError(
        f"{row.where}: a preference pair ({names}), as DPO takes it; {_TAKES}; "
        f"to train on the chosen answers, give --data.fields {option}"
    )


def refuse_label(row: Row) -> None:
    """Raise for a completion that is labeled good or bad, as KTO takes it.

    Raises:
      ValueError: the row has a label that is true or false.
    """
    label = row.fields.get("label")
    if label is None:
        return
    # A CSV file has them as text.
    word = str(label).lower()
    if label not in (0, 1) and word not in ("true", "false", "0", "1"):
        return
    raise ValueError(
        f"{row.where}: a completion with a label of good or bad (prompt, completion, label), as "
        f"KTO takes it; {_TAKES}; keep the rows whose label is true and remove the column, or give "
        "--data.shape prompt_completion to train on all completions"
    )


def unknown_shape(row: Row, required: Mapping[Any, tuple[str, ...]]) -> ValueError:
    """Returns the error for a row that matches no format, with the option that would help."""
    fields = row.fields
    if "input_ids" in fields:
        return ValueError(
            f"{row.where}: the row is tokenized already (input_ids); give the data before "
            "tokenization, since the tokens of another model would be wrong here"
        )
    if "role" in fields and {"content", "value", "text"} & set(fields):
        return ValueError(
            f"{row.where}: the row is a single turn (role, content); a row must hold a whole "
            'conversation: {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    shapes = []
    for shape, names in required.items():
        listed = ", ".join(names)
        shapes.append(f"{shape} ({listed})")
    known = "; ".join(shapes)
    return ValueError(
        f"{row.where}: the fields ({list_names(fields)}) match no known shape; known: {known}; "
        f"name the fields of your data with {_proposal(fields)}"
    )


def _proposal(fields: Mapping[str, Any]) -> str:
    """The option that fits the types of the row's fields best."""
    texts = [name for name, value in fields.items() if isinstance(value, str) and value]
    question = _named_like(texts, QUESTION_WORDS)
    answer = _named_like(texts, ANSWER_WORDS)
    for name, value in fields.items():
        role = _first_role(value)
        # A prompt of messages, whose completion has another name.
        if role == "user" and name == "prompt" and answer:
            return f"--data.fields completion={answer}"
        if role is not None:
            return f"--data.fields messages={name}"
    if texts == ["prompt"]:
        return "--data.fields, after adding the answers: a prompt alone has nothing to train on"
    if question and answer:
        return f"--data.fields question={question} answer={answer}"
    others = [name for name in texts if not re.search(_LABEL_WORDS, name, re.IGNORECASE)]
    if len(others) >= 2:
        # Questions mostly come first.
        first, second, *_ = others
        return f"--data.fields, for example --data.fields question={first} answer={second}"
    if others:
        return f"--data.fields, for example --data.fields text={others[0]} for plain text"
    return "--data.fields, for example --data.fields question=Q answer=A"


def _named_like(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The first of the names that contains one of the words."""
    for word in words:
        for name in names:
            if word in name.lower():
                return name
    return None


def _first_role(value: Any) -> str | None:
    """The role of the first turn; None if the value is no list of turns."""
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if not isinstance(first, dict):
        return None
    # ShareGPT's turns say "from".
    role = first.get("role", first.get("from"))
    if not isinstance(role, str):
        return None
    return role
