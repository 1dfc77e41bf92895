"""What a chat template writes around the assistant's turns: headers before, tokens after them."""

from __future__ import annotations

import dataclasses
import functools
import re

from lorax_ft.data.conversation import Conversation
from lorax_ft.data.marks import CLOSES, OPENS
from lorax_ft.data.rendering import Renderer
from lorax_ft.data.template import Form, Tokenizer

_OPENING = re.compile(rf"(?:{OPENS})\s*$")
_TAGS = re.compile(rf"{OPENS}|{CLOSES}")
_ROLES = ("user", "assistant", "user", "assistant")


class SpecialTokens:
    """The tokens of a tokenizer that may end a turn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any of them."""
        tokens = set(self._tokenizer.all_special_tokens)
        # Some checkpoints declare their end-of-turn token in the vocabulary only.
        for token in self._tokenizer.added_tokens_decoder.values():
            tokens.add(str(token))
        # Of two tokens that start alike, the longer one must match.
        alternatives = map(re.escape, _longest_first(tokens))
        never = "(?!)"
        return re.compile("|".join(alternatives) or never)

    @property
    def end(self) -> str | None:
        """The end-of-sequence token."""
        return self._tokenizer.eos_token

    @property
    def control(self) -> set[str]:
        """Those that are not text: `<tool_call>` of Qwen is a token and text."""
        return set(self._tokenizer.all_special_tokens)

    @functools.cached_property
    def special(self) -> set[str]:
        """Those that the tokenizer calls special; not all of them have names as eos_token has."""
        added = self._tokenizer.added_tokens_decoder.values()
        return self.control | {str(token) for token in added if token.special}

    def in_text(self, text: str) -> str | None:
        """The first special token in a text; None if it has none."""
        for token in self.pattern.finditer(text):
            if token.group() in self.special:
                return token.group()
        return None

    def whole(self, text: str, length: int) -> int:
        """The length without the start of a token at its end."""
        for token in self.pattern.finditer(text):
            if token.start() < length < token.end():
                return token.start()
        return length

    def run(self, text: str, excluded: set[str]) -> str:
        """The tokens at the start of a text, with white space between them."""
        end = 0
        position = _space(text, 0)
        while token := self.pattern.match(text, position):
            if token.group() in excluded:
                break
            end = token.end()
            position = _space(text, end)
        return text[:end].lstrip()

    def at_end(self, text: str) -> bool:
        """Whether a text ends with one of them, perhaps before white space."""
        longest = 64  # characters of a token
        last = text.rstrip()[-longest:]
        length = len(last)
        return any(token.end() == length for token in self.pattern.finditer(last))


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a template writes around the turns of a conversation."""

    tokens: SpecialTokens
    headers: tuple[str, ...] = ()
    """The generation prompt, and the parts of it that stand before answers; longest first."""
    before_answer: str = ""
    """What follows a user's text, if the template has no generation prompt."""
    ends: tuple[str, ...] | None = None
    """What ends the turns of the assistant, earlier ones and the last one; longest first.

    Empty if nothing ends them, None if that is not known."""

    def start(self, gap: str) -> int:
        """Where an answer starts in the text between the text before it and its own."""
        for header in self.headers:
            place = gap.rfind(header)
            if place >= 0:
                return place + len(header)
        # Without a generation prompt, a header cannot be told from the answer; an opening tag and
        # white space can.
        opening = _OPENING.search(gap)
        if opening:
            gap = gap[: opening.start()]
        before = self.before_answer
        if before and gap.startswith(before):
            rest = gap[len(before) :]
            if not rest.strip():
                return len(before)
        return len(gap)

    def start_of_calls(self, gap: str) -> int | None:
        """As `start`, for a gap that contains the beginning of a call; None if it is not known."""
        if any(header in gap for header in self.headers):
            return self.start(gap)
        before = self.before_answer.rstrip()
        if before and gap.startswith(before):
            return common_prefix(gap, self.before_answer)
        return None

    def end(self, tail: str) -> tuple[int, bool]:
        """Length of the end of a turn, and whether it is a token; `tail` follows its last text."""
        space = _space(tail, 0)
        for end in self.ends or ():
            visible = end.lstrip()
            if visible and tail.startswith(visible, space):
                return space + len(visible), self.tokens.at_end(end)
            if tail.startswith(end):
                return len(end), False
        # A turn that ends otherwise than those of the short conversation.
        token = self.tokens.pattern.match(tail, space)
        if token and (token.group() == self.tokens.end or self.ends is None):
            return token.end(), True
        return 0, False

    def end_of_calls(self, tail: str) -> tuple[int, bool] | None:
        """As `end`, for a turn with tool calls; None if it does not end as other turns do."""
        # Text of the template follows the last argument of a call, so an end may stand anywhere.
        written = []
        for end in self.ends or ():
            if end.strip() and end in tail:
                written.append(end)
        if not written:
            return None
        first = min(written, key=tail.find)
        length = tail.find(first) + len(first)
        return length, self.tokens.at_end(first)

    def token_after_calls(self, tail: str, calls: str) -> tuple[int, bool]:
        """As `end`, for a turn that ends with another token; the template wrote `calls`."""
        # Not a token that stands inside the calls, as quotes do.
        inside = set(self.tokens.pattern.findall(calls))
        ending = self.tokens.control - inside
        for token in self.tokens.pattern.finditer(tail):
            if token.group() in ending:
                return token.end(), True
        return 0, False


def find_frame(
    conversation: Conversation,
    form: Form,
    renderer: Renderer,
    tokens: SpecialTokens,
) -> Frame:
    """Finds the frame with a short conversation that has the tools and variables of another.

    The frame is empty if the template does not take the short conversation.
    """
    with_prompt = _gaps(conversation, form, renderer, turns=1, prompt=True)
    without_prompt = _gaps(conversation, form, renderer, turns=1, prompt=False)
    gaps = _gaps(conversation, form, renderer, turns=len(_ROLES), prompt=False)
    if not (with_prompt and without_prompt and gaps):
        return Frame(tokens)
    # The last of the texts between: what follows the user's.
    prompt = with_prompt[-1]
    plain = without_prompt[-1]
    _, first_head, between, last_head, last = gaps
    # What ends the user's turn stands with and without the generation prompt.
    shared = tokens.whole(prompt, common_prefix(prompt, plain))
    headers = set()
    # Before an answer, only a part of the generation prompt may stand.
    for head in (prompt, first_head, last_head):
        header = _shared_header(prompt, head, shared)
        if header.strip():
            headers.add(header)
    if not headers:
        end = _shared_end(between, last, tokens)
        return Frame(tokens, before_answer=plain, ends=_longest_first({end}))
    generation_prompt = prompt[shared:]
    opening = set(tokens.pattern.findall(generation_prompt))
    ends = _ends(between, last, opening, tokens)
    return Frame(tokens, headers=_longest_first(headers), ends=_longest_first(ends))


def _shared_end(between: str, last: str, tokens: SpecialTokens) -> str:
    """What follows both answers, up to its first token.

    Without headers, what follows an answer may open the next turn: only what both answers have in
    common belongs to them.
    """
    both = last[: common_prefix(between, last)]
    token = tokens.pattern.search(both)
    if token:
        return both[: token.end()]
    return both


def _shared_header(prompt: str, head: str, start: int) -> str:
    """What a generation prompt, from `start` on, and the text before an answer have in common."""
    same = common_prefix(prompt, head)
    rest = prompt[same:]
    other = head[same:]
    # A header may contain a number or a name, and go on as the prompt does.
    after = common_prefix(rest[::-1], other[::-1])
    last = rest[len(rest) - after :]
    # A tag of reasoning is not yet a header.
    if _TAGS.sub("", last).strip():
        return last
    return prompt[start:same]


def _ends(between: str, last: str, opening: set[str], tokens: SpecialTokens) -> set[str]:
    """What ends the turns, from the texts after the first and the last answer.

    `opening` are the tokens that open a turn.
    """
    shared = tokens.whole(between, common_prefix(between, last))
    both = between[:shared]
    last_end = tokens.run(last, opening)
    if last_end:
        earlier_end = tokens.run(both, opening) or tokens.run(between, opening)
        return {earlier_end, last_end}
    token = tokens.pattern.search(both)
    if token and token.group() not in opening:
        return {both[: token.end()]}  # such as the quote after a text that is written as JSON
    # Templates without such a token may end a turn with text or a line break.
    if both.isspace():
        return {both}
    return {both.rstrip()}


def _gaps(
    conversation: Conversation,
    form: Form,
    renderer: Renderer,
    *,
    turns: int,
    prompt: bool,
) -> list[str]:
    """What the template writes before, between and after the texts of a short conversation.

    Empty if the template rejects it or changes its texts.
    """
    messages = [{"role": role, "content": "text"} for role in _ROLES[:turns]]
    short = dataclasses.replace(conversation, messages=messages)
    try:
        written = renderer.write_in(form, short, prompt=prompt, where="")
    except ValueError:
        return []
    if written.pieces is None or len(written.pieces) != turns:
        return []
    text = written.rendered.text
    gaps = []
    end = 0  # of the text before
    for piece in written.pieces:
        gaps.append(text[end : piece.start])
        end = piece.end
    gaps.append(text[end:])
    return gaps


def common_prefix(one: str, other: str) -> int:
    """The number of characters that two texts share at their start."""
    shorter = min(len(one), len(other))
    for place in range(shorter):
        if one[place] != other[place]:
            return place
    return shorter


def _longest_first(texts: set[str]) -> tuple[str, ...]:
    visible = texts - {""}
    return tuple(sorted(visible, key=len, reverse=True))


def _space(text: str, position: int) -> int:
    """The first position from `position` on that is no white space."""
    rest = text[position:]
    space = len(rest) - len(rest.lstrip())
    return position + space
