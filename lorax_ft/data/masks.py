"""Finds the turns of the assistant in a rendered conversation.

The conversation is rendered twice: as it is, and with marks around its texts. If the second text
without its marks is the first, the marks show where the template put each text, whatever it adds,
drops or moves. A turn starts after the generation prompt and ends with the end-of-turn token.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lorax_ft.data.conversation import Conversation, texts_of
from lorax_ft.data.frames import Frame, SpecialTokens, common_prefix, find_frame
from lorax_ft.data.located import Located, Turn
from lorax_ft.data.marks import CLOSES, OPENS, THOUGHT, Piece, Span
from lorax_ft.data.rendering import Renderer, Written
from lorax_ft.data.template import Form, Tokenizer

_EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPENS})?\s*(?:{CLOSES})\s*")
_OPENING = re.compile(rf"(?:{OPENS})\s*$")
# Characters of all renderings up to a turn: about ten seconds.
_MOST_IN_PREFIXES = 50_000_000
_CLOSING = re.compile(rf"\s*(?:{CLOSES})\s*")


class TurnFinder:
    """Renders conversations with one tokenizer's template, and finds the assistant's turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renderer = Renderer(tokenizer)
        self._tokens = SpecialTokens(tokenizer)
        self._frames: dict[tuple[Any, ...], Frame] = {}

    def prompt(self, conversation: Conversation, *, where: str) -> str:
        """The conversation with the generation prompt at its end.

        Raises:
          ValueError: the template rejects the conversation.
        """
        return self._renderer.write(conversation, prompt=True, where=where).rendered.text

    def check_texts(self, conversation: Conversation, *, where: str) -> None:
        """Raise if a text contains a special token, which would be that token and no text.

        A user could end their turn with it, and speak as the system or the assistant.

        Raises:
          ValueError: a text does.
        """
        for place, text in texts_of(conversation):
            found = self._tokens.in_text(text)
            if found is not None:
                raise ValueError(
                    f"{where}, {place}: the text contains the special token {found}; "
                    "remove it, or give --data.control_tokens keep to train on it as a token"
                )

    def text(self, conversation: Conversation, *, where: str) -> Located:
        """Renders a conversation without looking for the assistant's turns.

        Raises:
          ValueError: the template rejects the conversation.
        """
        written = self._renderer.write(conversation, prompt=False, where=where)
        return Located(written.rendered.text, [], written.unwritten, written.form)

    def locate(self, conversation: Conversation, *, where: str) -> Located:
        """Renders a conversation and finds the turns of the assistant in it.

        Raises:
          ValueError: the template rejects the conversation, does not write a turn of the
            assistant, or changes the texts so that the turns cannot be found.
        """
        written = self._renderer.write(conversation, prompt=False, where=where)
        if written.pieces is None:
            if _too_long_for_prefixes(conversation, written):
                raise ValueError(
                    f"{where}: the conversation has {len(conversation.messages):,} turns, and the "
                    "chat template changes their texts, so finding the assistant's turns would "
                    "take too long; split the row"
                )
            turns = self._turns_by_prefixes(conversation, written, where)
        else:
            turns = list(self._turns(conversation, written, written.pieces))
            _check_all_found(conversation, turns, where)
        return Located(written.rendered.text, turns, written.unwritten, written.form)

    def _turns(
        self,
        conversation: Conversation,
        written: Written,
        pieces: list[Piece],
    ) -> Iterator[Turn]:
        """The turns around the assistant's texts."""
        text = written.rendered.text
        by_message = itertools.groupby(pieces, key=lambda piece: piece.message)
        runs = [list(run) for _, run in by_message]
        starts = [run[0].start for run in runs]
        ends = [run[-1].end for run in runs]
        # Between these lie the turns: the end of the run before, and the start of the run after.
        lefts = [0, *ends][:-1]
        rights = [*starts, len(text)][1:]
        for run, left, right in zip(runs, lefts, rights, strict=True):
            first = run[0]
            message = conversation.messages[first.message]
            if message["role"] != "assistant":
                continue
            spans, has_end = self._spans(conversation, written, run, left, right)
            start, _ = spans[0]
            before_texts = text[: first.start]
            yield Turn(
                first.message,
                spans,
                has_end,
                thought=_thought(text, start, run),
                empty_thought=_empty_thought(before_texts, start, message["content"]),
            )

    def _spans(
        self,
        conversation: Conversation,
        written: Written,
        run: Sequence[Piece],
        left: int,
        right: int,
    ) -> tuple[list[Span], bool]:
        """The spans of a turn of the assistant, and whether a token ends it.

        Args:
          conversation: the conversation.
          written: what the template wrote for it.
          run: the turn's texts.
          left: where the texts before them end.
          right: where the texts after them start.
        """
        # The template may say what the assistant generates.
        marked = _within(written.rendered.generated, left, right)
        if marked and _covers(marked, run):
            _, end = marked[-1]
            return marked, self._tokens.at_end(written.rendered.text[:end])
        start = self._start(conversation, written, run, left)
        end, has_end = self._end(conversation, written, run, right)
        return [(start, end)], has_end

    def _start(
        self,
        conversation: Conversation,
        written: Written,
        run: Sequence[Piece],
        left: int,
    ) -> int:
        """Where the turn around texts of the assistant starts; other texts end at `left`."""
        frame = self._frame(conversation, written.form)
        first = run[0]
        gap = written.rendered.text[left : first.start]
        if first.part != "tool_call":
            return left + frame.start(gap)
        length = frame.start_of_calls(gap)
        if length is not None:
            return left + length
        # The header is not in the gap, so the turn starts where the messages before it end.
        place = self._length(conversation, written, first.message)
        if place is not None and left <= place <= first.start:
            return place
        return left + frame.start(gap)

    def _end(
        self,
        conversation: Conversation,
        written: Written,
        run: Sequence[Piece],
        right: int,
    ) -> tuple[int, bool]:
        """Where the turn around texts of the assistant ends, and whether a token ends it.

        Other texts start at `right`.
        """
        if any(piece.part == "tool_call" for piece in run):
            return self._end_of_calls(conversation, written, run, right)
        text = written.rendered.text
        last = run[-1].end
        if run[-1].part == "reasoning":
            # A turn that only thinks.
            closing = _CLOSING.match(text, last, right)
            if closing:
                last = closing.end()
        frame = self._frame(conversation, written.form)
        length, has_end = frame.end(text[last:right])
        return last + length, has_end

    def _end_of_calls(
        self,
        conversation: Conversation,
        written: Written,
        run: Sequence[Piece],
        right: int,
    ) -> tuple[int, bool]:
        """As `_end`, for a turn with tool calls."""
        frame = self._frame(conversation, written.form)
        text = written.rendered.text
        last = run[-1].end
        found = frame.end_of_calls(text[last:right])
        if found:
            length, has_end = found
            return last + length, has_end
        # Results may follow in the same turn; what closes the calls stands before them.
        place = self._length(conversation, written, run[0].message + 1)
        if place is not None and last <= place <= right:
            return self._without_space(text[:place])
        calls = text[run[0].start : last]
        length, has_end = frame.token_after_calls(text[last:right], calls)
        return last + length, has_end

    def _without_space(self, turn: str) -> tuple[int, bool]:
        """Where a turn ends, without white space after its token; and whether a token ends it."""
        has_end = self._tokens.at_end(turn)
        if has_end:
            turn = turn.rstrip()
        return len(turn), has_end

    def _length(self, conversation: Conversation, written: Written, count: int) -> int | None:
        """Length of what the template writes for the first messages; None if it is not known."""
        if _too_long_for_prefixes(conversation, written):
            return None
        try:
            prefix = self._prefix(conversation, written.form, count, prompt=False, where="")
        except ValueError:
            return None
        if not written.rendered.text.startswith(prefix):
            return None
        return len(prefix)

    def _frame(self, conversation: Conversation, form: Form) -> Frame:
        """What the template writes around the turns of such a conversation."""
        # What a template may write differently by; finding a frame renders several conversations.
        has_tools = bool(conversation.tools)
        has_documents = bool(conversation.documents)
        variables = repr(sorted(conversation.template_args.items()))
        key = (has_tools, has_documents, form, variables)
        if key not in self._frames:
            self._frames[key] = find_frame(conversation, form, self._renderer, self._tokens)
        return self._frames[key]

    def _turns_by_prefixes(
        self,
        conversation: Conversation,
        written: Written,
        where: str,
    ) -> list[Turn]:
        """Finds the turns by rendering the conversation up to each of them.

        This is for templates that change the texts, for example by replacing characters.
        """
        text = written.rendered.text
        turns = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._prefix(conversation, written.form, index, prompt=True, where=where)
            through = text
            if index + 1 < len(conversation.messages):
                through = self._prefix(
                    conversation, written.form, index + 1, prompt=False, where=where
                )
            # Each rendering must go on as the one before it.
            if not (through.startswith(before) and text.startswith(through)):
                same_before = common_prefix(text, before)
                same_through = common_prefix(text, through)
                place = min(same_before, same_through)
                raise _unlocated(text, place, index, where)
            start = len(before)
            end, has_end = self._without_space(through)
            turns.append(Turn(index, [(start, end)], has_end))
        return turns

    def _prefix(
        self,
        conversation: Conversation,
        form: Form,
        count: int,
        *,
        prompt: bool,
        where: str,
    ) -> str:
        """The rendered first messages of a conversation."""
        first = dataclasses.replace(conversation, messages=conversation.messages[:count])
        return self._renderer.render_in(form, first, prompt=prompt, where=where).text


def _too_long_for_prefixes(conversation: Conversation, written: Written) -> bool:
    """Whether rendering the conversation up to each of its turns would take minutes."""
    return len(conversation.messages) * len(written.rendered.text) > _MOST_IN_PREFIXES


def _check_all_found(conversation: Conversation, turns: Sequence[Turn], where: str) -> None:
    """Raises if the template did not write a turn of the assistant."""
    found = {turn.message for turn in turns}
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or index in found:
            continue
        what = "this turn of the assistant"
        if message.get("tool_calls"):
            what = "the tool calls of this turn"
        raise ValueError(
            f"{where}, turn {index + 1}: the chat template does not write {what}; "
            "remove the turn, or use another chat template"
        )


def _unlocated(text: str, place: int, index: int, where: str) -> ValueError:
    first = max(0, place - 60)
    around = text[first : place + 60]
    return ValueError(
        f"{where}, turn {index + 1}: the chat template changes the texts, and renders this turn "
        "differently when more turns follow, so the assistant's tokens cannot be located; around "
        f"that place it wrote {around!r}; use --data.loss_on all, or another chat template"
    )


def _thought(text: str, start: int, run: Sequence[Piece]) -> Span | None:
    """The reasoning of a turn with its tags."""
    reasoning = [piece for piece in run if piece.part == "reasoning"]
    if not reasoning:
        return None
    first = reasoning[0].start
    last = reasoning[-1].end
    opening = _OPENING.search(text, start, first)
    if opening:
        first = opening.start()
    closing = _CLOSING.match(text, last)
    if closing:
        last = closing.end()
    return first, last


def _empty_thought(text: str, start: int, content: str) -> Span | None:
    """The empty thought that the template wrote between `start` and the end of `text`."""
    found = THOUGHT.fullmatch(content)
    # An empty thought that stands in the data is the data's.
    if found and not found.group("thought").strip():
        return None
    empty = _EMPTY_THOUGHT.search(text, start)
    if empty is None:
        return None
    return empty.span()


def _within(spans: Sequence[Span], left: int, right: int) -> list[Span]:
    """The spans that start between two places and are not empty."""
    found = []
    for start, end in spans:
        if left <= start < right and start < end:
            found.append((start, end))
    return found


def _covers(spans: Sequence[Span], run: Sequence[Piece]) -> bool:
    """Whether each text lies in one of the spans."""
    return all(_lies_in(piece, spans) for piece in run)


def _lies_in(piece: Piece, spans: Sequence[Span]) -> bool:
    """Whether one of the spans contains the whole text."""
    return any(start <= piece.start and piece.end <= end for start, end in spans)
