"""What a row of a dataset becomes: a conversation for the chat template, or plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation, as chat templates read it.

Always: "role" ("system", "developer", "user", "assistant" or "tool") and "content" (text).
Where the data has them: "reasoning_content" (text), "tool_calls", "tool_call_id", "name", and
other fields, which only a template that knows them uses. Fields that are null are absent.
"train" (bool) is ours: whether the turn's tokens count in the loss; the template never sees it.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Everything that a chat template renders."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    documents: list[dict[str, Any]] | None = None
    """Documents to answer from, for templates that take them."""
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainText:
    """Text that is tokenized without a chat template, and ends with the end-of-sequence token."""

    completion: str
    """The text to train on."""
    prompt: str = ""
    """Text before it, whose tokens do not count in the loss."""


Example = Conversation | PlainText
"""One row of a dataset."""


def texts_of(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yields all that the data say in a conversation, each with its place, such as "turn 2".

    Calls, tools and documents are the text of their values.
    """
    for number, message in enumerate(conversation.messages, 1):
        for name, value in message.items():
            if name not in ("role", "train"):
                yield f"turn {number}", str(value)
    yield "tools", str(conversation.tools or "")
    yield "documents", str(conversation.documents or "")


def as_conversation(given: Conversation | Sequence[Message]) -> Conversation:
    """The conversation itself, or one of the given messages and nothing else."""
    if isinstance(given, Conversation):
        return given
    return Conversation(messages=list(given))
