"""The turns of the assistant in a rendered conversation, and which of their text counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from lorax_ft.data.conversation import Conversation
from lorax_ft.data.marks import Span
from lorax_ft.data.template import Form

LossOn = Literal["assistant", "last", "all"]
ReasoningLoss = Literal["data", "all", "none"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the assistant in the rendered conversation."""

    message: int
    """Its index in the conversation."""
    spans: list[Span]
    """What the assistant generates: its text and its end-of-turn token."""
    has_end: bool
    """Whether it ends with an end-of-turn token."""
    thought: Span | None = None
    """Its reasoning with the tags, if it has any."""
    empty_thought: Span | None = None
    """An empty thought that the template wrote, as Qwen3's does."""


@dataclasses.dataclass(frozen=True)
class Located:
    """A rendered conversation, and the turns of the assistant in it."""

    text: str
    turns: list[Turn]
    unwritten: list[str]
    """What the template did not write, such as "tool calls"."""
    form: Form
    """The form of the messages that the template took."""

    def label_spans(
        self,
        conversation: Conversation,
        *,
        loss_on: LossOn,
        reasoning: ReasoningLoss,
    ) -> list[Span]:
        """The characters whose tokens count in the loss."""
        trained, excluded = [], []
        for turn in self.turns:
            is_last = turn is self.turns[-1]
            wanted = conversation.messages[turn.message].get("train", True)
            if not wanted or (loss_on == "last" and not is_last):
                excluded += turn.spans
                continue
            trained += turn.spans
            if turn.thought and reasoning == "none":
                excluded.append(turn.thought)
            if turn.empty_thought and reasoning != "all":
                excluded.append(turn.empty_thought)
        if loss_on == "all":
            trained = [(0, len(self.text))]
        return _subtract(trained, excluded)


def _subtract(spans: Sequence[Span], excluded: Sequence[Span]) -> list[Span]:
    """The spans without the excluded ones."""
    left = list(spans)
    for low, high in excluded:
        pieces = []
        for start, end in left:
            pieces += [(start, min(end, low)), (max(start, high), end)]
        left = [(start, end) for start, end in pieces if start < end]
    return left
