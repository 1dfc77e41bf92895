"""Puts marks around the texts of a conversation, and finds them again in what a template wrote.

A mark is a private-use character that the conversation does not contain, so a template copies it
like a letter. Marks stand inside the white space around a text: templates strip that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from lorax_ft.data.conversation import Conversation, Message

Part = Literal["reasoning", "content", "tool_call"]

# The two planes for private use: 65,534 characters each. The second is for data that contains
# characters of the first, as the icons of some fonts.
_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE

# What opens and closes a thought inside the text of an answer.
THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
OPENS = "|".join(re.escape(opening) for opening, _ in THOUGHT_TAGS)
CLOSES = "|".join(re.escape(closing) for _, closing in THOUGHT_TAGS)
# The opening tag may be missing, where the generation prompt contains it.
THOUGHT = re.compile(
    rf"(?P<open>\s*(?:{OPENS})?)(?P<thought>.*?)(?P<close>(?:{CLOSES}))(?P<answer>.*)", re.DOTALL
)


Span = tuple[int, int]
"""Start and end of a range of characters, the end exclusive."""


class Piece(NamedTuple):
    """A text of a message, and where it stands in the rendered conversation."""

    message: int
    part: Part
    start: int
    end: int


class _Text(NamedTuple):
    """A text between marks, and the white space around it."""

    message: int
    part: Part
    before: str
    after: str


class _TooManyTextsError(Exception):
    pass


@dataclasses.dataclass
class Marks:
    """A conversation with marks, and which text each pair of marks encloses."""

    first: int
    """The code point of the first mark."""
    texts: list[_Text] = dataclasses.field(default_factory=list)
    """The texts, in the order of their marks."""

    def around(self, text: str, message: int, part: Part) -> str:
        """The text with two new marks, inside the white space around it."""
        # Text n has the marks 2 n and 2 n + 1.
        code = self.first + 2 * len(self.texts)
        if code + 1 > self.first + _PLANE_SIZE:
            raise _TooManyTextsError
        opening = chr(code)
        closing = chr(code + 1)
        start, end = _core(text)
        before = text[:start]
        core = text[start:end]
        after = text[end:]
        self.texts.append(_Text(message, part, before, after))
        return f"{before}{opening}{core}{closing}{after}"

    def find(self, marked: str) -> tuple[str, list[Piece] | None]:
        """The text without its marks, and the pieces that it contains, in order.

        There are no pieces if a text has lost one of its marks.
        """
        first_mark = chr(self.first)
        last_mark = chr(self.first + _PLANE_SIZE)
        pattern = re.compile(f"[{first_mark}-{last_mark}]")
        written = pattern.sub("", marked)
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for count, match in enumerate(pattern.finditer(marked)):
            # Each mark before this one is a character that the clean text lacks.
            place = match.start() - count
            number, is_end = divmod(ord(match.group()) - self.first, 2)
            places = ends if is_end else starts
            # Where a template writes a text twice, the first place counts.
            places.setdefault(number, place)
        pieces = []
        for number, text in enumerate(self.texts):
            if number not in starts and number not in ends:
                continue  # the template left the text out
            start = starts.get(number, -1)
            end = ends.get(number, -1)
            if not 0 <= start <= end:
                return written, None
            start, end = _with_space(written, start, end, text)
            pieces.append(Piece(text.message, text.part, start, end))
        pieces.sort(key=lambda piece: (piece.start, piece.end))
        return written, pieces


def mark(
    conversation: Conversation,
    *,
    only_assistant: bool = False,
) -> tuple[Conversation, Marks] | None:
    """Puts marks around the texts of all messages, or of the assistant's alone.

    Returns None if the conversation contains characters of both planes, or too many texts.
    """
    used: set[int] = set()
    for message in conversation.messages:
        used |= {_plane(text) for text in _strings(message)}
    for plane in _PLANES:
        if plane in used:
            continue
        marks = Marks(plane)
        messages = []
        try:
            for index, message in enumerate(conversation.messages):
                if message["role"] == "assistant":
                    message = _mark_answer(message, index, marks)
                elif not only_assistant:
                    content = marks.around(message["content"], index, "content")
                    message = {**message, "content": content}
                messages.append(message)
        except _TooManyTextsError:
            return None
        return dataclasses.replace(conversation, messages=messages), marks
    return None


def _mark_answer(message: Message, index: int, marks: Marks) -> Message:
    marked = dict(message)
    reasoning = message.get("reasoning_content", "")
    if reasoning.strip():
        marked["reasoning_content"] = marks.around(reasoning, index, "reasoning")
    # Templates ask whether there is a text beside reasoning or calls; marks would make one.
    content = message["content"]
    calls = message.get("tool_calls")
    has_more = "reasoning_content" in message or bool(calls)
    if content.strip() or not has_more:
        marked["content"] = _mark_content(content, index, marks)
    if calls:
        marked["tool_calls"] = [_mark_call(call, index, marks) for call in calls]
    return marked


def _mark_content(content: str, index: int, marks: Marks) -> str:
    """The text of an answer with marks; a thought in it gets marks of its own."""
    found = THOUGHT.fullmatch(content)
    if found is None:
        return marks.around(content, index, "content")
    opening, thought, closing, answer = found.group("open", "thought", "close", "answer")
    if thought.strip():
        thought = marks.around(thought, index, "reasoning")
    if answer.strip():
        answer = marks.around(answer, index, "content")
    return f"{opening}{thought}{closing}{answer}"


def _mark_call(call: Any, index: int, marks: Marks) -> Any:
    """A tool call with marks around the function's name and the texts of its arguments."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        function = _mark_call(call["function"], index, marks)
        return {**call, "function": function}
    marked = dict(call)
    if isinstance(call.get("name"), str):
        marked["name"] = marks.around(call["name"], index, "tool_call")
    if "arguments" in call:
        marked["arguments"] = _mark_value(call["arguments"], index, marks)
    return marked


def _mark_value(value: Any, index: int, marks: Marks) -> Any:
    """A value of a call's arguments, with marks around the texts in it; numbers get none."""
    if isinstance(value, str) and value.strip():
        return marks.around(value, index, "tool_call")
    if isinstance(value, dict):
        return {key: _mark_value(item, index, marks) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_value(item, index, marks) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """All texts in a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _core(text: str) -> tuple[int, int]:
    """Start and end of a text without the white space around it; all of a text of white space."""
    core = text.strip()
    if not core:
        return 0, len(text)
    start = len(text) - len(text.lstrip())
    return start, start + len(core)


def _with_space(written: str, start: int, end: int, text: _Text) -> Span:
    """The place of a text, with its own white space where the template kept it."""
    if written.endswith(text.before, 0, start):
        start -= len(text.before)
    if written.startswith(text.after, end):
        end += len(text.after)
    return start, end


def _plane(text: str) -> int:
    """The plane for private use that a text has characters of, or 0."""
    if text.isascii():
        return 0
    largest = ord(max(text))
    first, second = _PLANES
    if largest >= second:
        return second
    if largest >= first:
        return first
    return 0
