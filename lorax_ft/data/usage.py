"""Which parts of conversations the chat template does not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lorax_ft.data.chat import Tokenizer
from lorax_ft.data.conversation import Conversation

# Fields of a message that every template reads, or that are ours.
_USUAL_FIELDS = ("role", "content", "train")
# The names under which templates read a field of ours.
_TEMPLATE_NAMES = {"reasoning_content": ("reasoning_content", "reasoning", "thinking")}


def optional_fields(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yields what a conversation has that not every template reads, once for each time.

    Each has a name, and the kind of thing that it is if the name does not say it.
    """
    for message in conversation.messages:
        for name in message:
            if name not in _USUAL_FIELDS:
                yield name, "message field"
    if conversation.tools:
        yield "tools", ""
    if conversation.documents:
        yield "documents", ""
    for name in conversation.template_args:
        yield name, "template variable"


def unknown_fields(counts: Mapping[tuple[str, str], int], tokenizer: Tokenizer) -> dict[str, int]:
    """Returns those of the optional fields that the chat template does not mention.

    Args:
      counts: how often each of the `optional_fields` occurs.
      tokenizer: the tokenizer with the template.

    Returns:
      The counts under names for the user.
    """
    template = tokenizer.chat_template or ""
    if not isinstance(template, str):  # several templates by name
        template = "\n".join(template.values())
    unknown = {}
    for (name, kind), count in counts.items():
        # A word is enough: to follow the template's variables would take an interpreter.
        known_names = _TEMPLATE_NAMES.get(name, (name,))
        words = "|".join(map(re.escape, known_names))
        if not re.search(rf"\b({words})\b", template):
            label = f"{kind} {name}".strip()
            unknown[f"{label} (not in the chat template)"] = count
    return unknown
