"""Finds the turns of the assistant in a rendered conversation.

The conversation is rendered twice: as it is, and with marks around its texts. If the second text
without its marks is the first, the marks show where the template put each text, whatever it adds,
drops or moves. A turn starts after the generation prompt and ends with the end-of-turn token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lorax_ft.data.conversation import Conversation
from lorax_ft.data.marks import CLOSES, OPENS, THOUGHT, Piece, Span, mark
from lorax_ft.data.template import FORMS, PARTS, Form, Rendered, Tokenizer, render

LossOn = Literal["assistant", "last", "all"]
ReasoningLoss = Literal["data", "all", "none"]

_EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPENS})?\s*(?:{CLOSES})\s*")
_OPENING = re.compile(rf"(?:{OPENS})\s*$")
_CLOSING = re.compile(rf"\s*(?:{CLOSES})\s*")


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
    """What the template did not write, such as "system"."""

    def label_spans(
        self, conversation: Conversation, *, loss_on: LossOn, reasoning: ReasoningLoss
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


class _Frame(NamedTuple):
    """What a template writes around the turns of a conversation."""

    headers: tuple[str, ...]
    """The generation prompt, and the parts of it that stand before answers; longest first."""
    before_answer: str
    """What follows a user's text, if the template has no generation prompt."""
    ends: tuple[str, ...]
    """What ends the turns of the assistant: an earlier one, and the last one."""


class TurnFinder:
    """Renders conversations with one tokenizer's template, and finds the assistant's turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._form = FORMS[0]
        self._frames: dict[tuple[Any, ...], _Frame] = {}

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches the tokens that may end a turn."""
        tokens = set(self._tokenizer.all_special_tokens)
        # Some checkpoints declare their end-of-turn token in the vocabulary only.
        for token in self._tokenizer.added_tokens_decoder.values():
            tokens.add(str(token))
        tokens.discard("")
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def prompt(self, conversation: Conversation, *, where: str) -> str:
        """The conversation with the generation prompt at its end.

        Raises:
          ValueError: the template rejects the conversation.
        """
        text, _, _ = self._render(conversation, prompt=True, where=where)
        return text.text

    def text(self, conversation: Conversation, *, where: str) -> Located:
        """Renders a conversation without looking for the assistant's turns.

        Raises:
          ValueError: the template rejects the conversation.
        """
        rendered, _, unwritten = self._render(conversation, prompt=False, where=where)
        return Located(rendered.text, [], unwritten)

    def locate(self, conversation: Conversation, *, where: str) -> Located:
        """Renders a conversation and finds the turns of the assistant in it.

        Raises:
          ValueError: the template rejects the conversation, does not write a turn of the
            assistant, or changes the texts so that the turns cannot be found.
        """
        rendered, pieces, unwritten = self._render(conversation, prompt=False, where=where)
        if pieces is None:
            turns = self._turns_by_prefixes(conversation, rendered.text, where)
        else:
            turns = list(self._turns(conversation, rendered, pieces, where))
        return Located(rendered.text, turns, unwritten)

    def _render(
        self, conversation: Conversation, *, prompt: bool, where: str
    ) -> tuple[Rendered, list[Piece] | None, list[str]]:
        """Renders in the first form in which the template writes all texts.

        Returns the text, its pieces (None if marks change what the template writes), and what the
        template does not write in any form.
        """
        error: ValueError | None = None
        best: tuple[Rendered, list[Piece] | None, list[str]] | None = None
        best_form = self._form
        for form in _forms(conversation, first=self._form):
            try:
                rendered = render(
                    conversation, self._tokenizer, form=form, prompt=prompt, where=where
                )
            except ValueError as problem:
                if isinstance(problem.__cause__, TimeoutError):
                    raise
                error = error or problem
                continue
            if form.parts and PARTS in rendered.text:
                continue  # The template wrote the list itself.
            pieces, roles = self._pieces(conversation, rendered.text, form, prompt)
            unwritten = [] if pieces is None else _unwritten(conversation, pieces, roles)
            if best is None or len(unwritten) < len(best[2]):
                best, best_form = (rendered, pieces, unwritten), form
            if not unwritten:
                break
        if best is None:
            assert error is not None
            raise error
        self._form = best_form
        return best

    def _pieces(
        self, conversation: Conversation, text: str, form: Form, prompt: bool
    ) -> tuple[list[Piece] | None, set[str]]:
        """Where the texts stand in `text`, and of which roles; None if marks change it."""
        roles = {message["role"] for message in conversation.messages}
        # A template may look at the start of a user's text, and then write something else.
        for only_assistant in (False, True):
            marked = mark(conversation, only_assistant=only_assistant)
            if marked is None:
                continue
            with_marks, marks = marked
            try:
                rendered = render(with_marks, self._tokenizer, form=form, prompt=prompt)
            except ValueError:
                continue
            clean, pieces = marks.find(rendered.text)
            if clean == text and pieces is not None:
                return pieces, roles & {"assistant"} if only_assistant else roles
        return None, set()

    def _turns(
        self, conversation: Conversation, rendered: Rendered, pieces: list[Piece], where: str
    ) -> Iterator[Turn]:
        text = rendered.text
        frame = self._frame(conversation)
        runs = [list(run) for _, run in itertools.groupby(pieces, key=lambda piece: piece.message)]
        found = set()
        for number, run in enumerate(runs):
            message = conversation.messages[run[0].message]
            if message["role"] != "assistant":
                continue
            found.add(run[0].message)
            left = runs[number - 1][-1].end if number else 0
            right = runs[number + 1][0].start if number + 1 < len(runs) else len(text)
            first, last = run[0].start, max(piece.end for piece in run)
            generated = _within(rendered.generated, left, right)
            if generated and _covers(generated, run):
                # The template says what the assistant generates.
                spans = generated
                has_end = self._ends_with_token(text[: spans[-1][1]])
            else:
                start = _start(text[left:first], frame) + left
                is_call = any(piece.part == "tool_call" for piece in run)
                tail = text[last:right]
                length, has_end = self._end(tail, frame, text[first:last] if is_call else None)
                spans = [(start, last + length)]
            thought = _thought(text, spans[0][0], run)
            empty = _empty_thought(text[:first], spans[0][0], message["content"])
            yield Turn(run[0].message, spans, has_end, thought, empty)
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and index not in found:
                what = "the tool calls of this turn" if message.get("tool_calls") else "this turn"
                raise ValueError(
                    f"{where}, turn {index + 1}: the chat template does not write {what} of the "
                    "assistant; remove the turn, or use another chat template"
                )

    def _frame(self, conversation: Conversation) -> _Frame:
        """What the template writes around turns, found out with a short conversation."""
        key = (
            bool(conversation.tools),
            bool(conversation.documents),
            self._form,
            repr(sorted(conversation.template_args.items())),
        )
        if key not in self._frames:
            self._frames[key] = self._find_frame(conversation)
        return self._frames[key]

    def _find_frame(self, conversation: Conversation) -> _Frame:
        try:
            prompt = self._gaps(conversation, 1, prompt=True)[-1]
            plain = self._gaps(conversation, 1, prompt=False)[-1]
            # Around user, assistant, user, assistant.
            _, first_head, middle, last_head, end = self._gaps(conversation, 4, prompt=False)
        except _NoFrameError:
            return _Frame((), "", ())
        shared = self._whole_tokens(prompt, _common_prefix(prompt, plain))
        headers = set()
        for head in (prompt, first_head, last_head):
            header = prompt[shared : _common_prefix(prompt, head)]
            if header.strip():
                headers.add(header)
        if not headers:
            # Without a generation prompt, the text after an answer may open the next turn, so only
            # what two answers have in common belongs to them.
            both = end[: _common_prefix(middle, end)]
            token = self._special.search(both)
            return _Frame((), plain, (both[: token.end()] if token else both,))
        header_tokens = set(self._special.findall(prompt[shared:]))
        last_end = self._run_of_tokens(end, header_tokens)
        both = middle[: self._whole_tokens(middle, _common_prefix(middle, end))]
        earlier_end = self._run_of_tokens(both, header_tokens)
        if last_end and not earlier_end:
            earlier_end = self._run_of_tokens(middle, header_tokens)
        if not last_end:
            # Templates without such a token may end a turn with a line break.
            last_end = earlier_end = both if both.isspace() else ""
        return _Frame(tuple(sorted(headers, key=len, reverse=True)), "", (earlier_end, last_end))

    def _gaps(self, conversation: Conversation, turns: int, *, prompt: bool) -> list[str]:
        """What the template writes before, between and after the texts of a short conversation."""
        messages = [
            {"role": role, "content": "text"} for role in ("user", "assistant", "user", "assistant")
        ]
        short = dataclasses.replace(conversation, messages=messages[:turns])
        try:
            text = render(short, self._tokenizer, form=self._form, prompt=prompt).text
        except ValueError as error:
            raise _NoFrameError from error
        pieces, _ = self._pieces(short, text, self._form, prompt)
        if pieces is None or len(pieces) != turns:
            raise _NoFrameError
        borders = [0, *itertools.chain.from_iterable((p.start, p.end) for p in pieces), len(text)]
        return [text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True)]

    def _whole_tokens(self, text: str, length: int) -> int:
        """The length without the start of a special token at its end."""
        for token in self._special.finditer(text):
            if token.start() < length < token.end():
                return token.start()
        return length

    def _run_of_tokens(self, text: str, excluded: set[str]) -> str:
        """Special tokens at the start of a text, with white space between them."""
        end = 0
        position = 0
        while True:
            position += len(text[position:]) - len(text[position:].lstrip())
            token = self._special.match(text, position)
            if token is None or token.group() in excluded:
                return text[:end].lstrip()
            position = end = token.end()

    def _end(self, tail: str, frame: _Frame, calls: str | None) -> tuple[int, bool]:
        """Length of the end of a turn, and whether it is a token.

        `tail` follows the last text of the turn; `calls` is what the template wrote of its tool
        calls, if it has any.
        """
        space = len(tail) - len(tail.lstrip())
        # The last turn's end may be longer, as Phi-3's.
        for end in sorted(frame.ends, key=len, reverse=True):
            if end.strip() and tail.startswith(end.lstrip(), space):
                return space + len(end.lstrip()), True
            if end and tail.startswith(end):
                return len(end), False
        if calls is None:
            return self._unknown_end(tail, space, frame)
        # Text of the template follows the last argument of a call.
        places = [(tail.find(end), end) for end in frame.ends if end.strip() and end in tail]
        if places:
            place, end = min(places)
            return place + len(end), True
        # Otherwise a special token ends the call, but not one that stands inside it, as quotes do.
        inside = set(self._special.findall(calls))
        control = set(self._tokenizer.all_special_tokens) - inside
        for token in self._special.finditer(tail):
            if token.group() in control:
                return token.end(), True
        return 0, False

    def _unknown_end(self, tail: str, space: int, frame: _Frame) -> tuple[int, bool]:
        """As `_end`, for a turn without calls that ends otherwise than the short conversation."""
        token = self._special.match(tail, space)
        eos = self._tokenizer.eos_token
        if token is not None and (token.group() == eos or not frame.ends):
            return token.end(), True
        return 0, False

    def _ends_with_token(self, text: str) -> bool:
        text = text.rstrip()
        longest = 64  # characters of a special token
        return any(
            token.end() == min(longest, len(text))
            for token in self._special.finditer(text[-longest:])
        )

    def _turns_by_prefixes(self, conversation: Conversation, text: str, where: str) -> list[Turn]:
        """Finds the turns by rendering the conversation up to each of them.

        This is for templates that change the texts, for example by replacing characters.
        """
        turns = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._prefix(conversation, index, prompt=True, where=where)
            through = text
            if index + 1 < len(conversation.messages):
                through = self._prefix(conversation, index + 1, prompt=False, where=where)
            if not (through.startswith(before) and text.startswith(through)):
                place = min(_common_prefix(text, before), _common_prefix(text, through))
                around = text[max(0, place - 60) : place + 60]
                raise ValueError(
                    f"{where}, turn {index + 1}: the chat template changes the texts, and renders "
                    "this turn differently when more turns follow, so the assistant's tokens "
                    f"cannot be located; around that place it wrote {around!r}; "
                    "use --data.loss_on all, or another chat template"
                )
            end = len(through)
            trimmed = through.rstrip()
            has_end = self._ends_with_token(trimmed)
            if has_end:
                end = len(trimmed)
            turns.append(Turn(index, [(len(before), end)], has_end))
        return turns

    def _prefix(self, conversation: Conversation, count: int, *, prompt: bool, where: str) -> str:
        messages = conversation.messages[:count]
        prefix = dataclasses.replace(conversation, messages=messages)
        return render(prefix, self._tokenizer, form=self._form, prompt=prompt, where=where).text


class _NoFrameError(Exception):
    """The template does not take the short conversation, or changes its texts."""


def _forms(conversation: Conversation, *, first: Form) -> Iterator[Form]:
    """The forms in which this conversation differs, `first` first."""
    calls = any(message.get("tool_calls") for message in conversation.messages)
    seen = set()
    for form in (first, *FORMS):
        if not calls:
            form = Form(parts=form.parts)
        if form not in seen:
            seen.add(form)
            yield form


def _unwritten(
    conversation: Conversation, pieces: Sequence[Piece], roles: Container[str]
) -> list[str]:
    """The roles (of those given) and calls whose texts the template did not write."""
    written = {(piece.message, piece.part) for piece in pieces}
    missing = []
    for index, message in enumerate(conversation.messages):
        role = message["role"]
        if message.get("tool_calls") and (index, "tool_call") not in written:
            missing.append("tool_calls")
        found = THOUGHT.fullmatch(message["content"]) if role == "assistant" else None
        answer = found.group("answer") if found else message["content"]
        if answer.strip() and role in roles and (index, "content") not in written:
            missing.append(f"content of the role {role}")
    return missing


def _start(gap: str, frame: _Frame) -> int:
    """Where an answer starts in the text between the text before it and its own."""
    for header in frame.headers:
        place = gap.rfind(header)
        if place >= 0:
            return place + len(header)
    # Without a generation prompt, a header cannot be told from the answer; an opening tag and white
    # space can.
    opening = _OPENING.search(gap)
    if opening:
        gap = gap[: opening.start()]
    before = frame.before_answer
    if before and gap.startswith(before) and not gap[len(before) :].strip():
        return len(before)
    return len(gap)


def _thought(text: str, start: int, run: Sequence[Piece]) -> Span | None:
    """The reasoning of a turn with its tags."""
    reasoning = [piece for piece in run if piece.part == "reasoning"]
    if not reasoning:
        return None
    opening = _OPENING.search(text, start, reasoning[0].start)
    closing = _CLOSING.match(text, reasoning[-1].end)
    return (
        opening.start() if opening else reasoning[0].start,
        closing.end() if closing else reasoning[-1].end,
    )


def _empty_thought(text: str, start: int, content: str) -> Span | None:
    """The empty thought that the template wrote between `start` and the end of `text`."""
    found = THOUGHT.fullmatch(content)
    # An empty thought that stands in the data is the data's.
    if found and not found.group("thought").strip():
        return None
    empty = _EMPTY_THOUGHT.search(text, start)
    return empty.span() if empty else None


def _within(spans: Sequence[Span], left: int, right: int) -> list[Span]:
    return [span for span in spans if left <= span[0] < span[1] and span[0] < right]


def _covers(spans: Sequence[Span], run: Sequence[Piece]) -> bool:
    return all(
        any(start <= piece.start and piece.end <= end for start, end in spans) for piece in run
    )


def _subtract(spans: Sequence[Span], excluded: Sequence[Span]) -> list[Span]:
    """The spans without the excluded ones."""
    left = list(spans)
    for low, high in excluded:
        pieces = []
        for start, end in left:
            pieces += [(start, min(end, low)), (max(start, high), end)]
        left = [(start, end) for start, end in pieces if start < end]
    return left


def _common_prefix(one: str, other: str) -> int:
    """The number of characters that two texts share at their start."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
