"""Samples from conversations: the chat template applied, tokens, and the mask of those that count in the loss.

Letters: N tokens of a sample.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from lorax_ft.data.formats import Message

LossOn = Literal["assistant", "all"]
Tokenizer = Any
"""A transformers tokenizer; not named by its type, so that importing this module stays cheap."""
Span = tuple[int, int]

_CHUNK = 1024  # conversations tokenized at once: enough to keep all cores busy, few enough to keep offsets small


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One conversation as the model sees it."""

    tokens: np.ndarray
    """Token ids, int32 [N]."""
    mask: np.ndarray
    """Whether a token counts as a label, bool [N]."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """The samples of many conversations, and what became of the others."""

    samples: list[Sample]
    cut: int
    """Conversations longer than `max_length`."""
    dropped: int
    """Conversations that have no label, mostly because it was cut away; they are not among the samples."""
    usual_length: int
    """Tokens that 95 % of the conversations fit into."""


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "assistant",
    where: str = "conversation",
) -> Sample:
    """One conversation as a sample, cut to `max_length` tokens.

    A token counts as a label if it holds text of an assistant turn: what the template writes from the generation
    prompt on, up to and including the end-of-turn token. The text is tokenized once, so that tokens are those which
    the template gives.

    Raises:
      ValueError: the tokenizer has no chat template or no offsets, the template refuses the conversation, or writes
        its beginning otherwise than on its own (then assistant turns cannot be found).
    """
    return _cut(next(_samples([messages], tokenizer, loss_on=loss_on, where=[where])), max_length)


def encode_all(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "assistant",
    where: Sequence[str],
) -> Encoded:
    """Many conversations as samples, in their order; `where` names the place of each for errors.

    Raises:
      ValueError: as `encode`, or no sample keeps a label.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    for sample in _samples(conversations, tokenizer, loss_on=loss_on, where=where):
        lengths.append(len(sample))
        short = _cut(sample, max_length)
        if short.mask[1:].any():  # the first token is nobody's target
            samples.append(short)
    if conversations and not samples:
        raise ValueError(
            f"none of the {len(conversations)} samples keeps a token to learn within {max_length} tokens; "
            "raise data.max_length"
        )
    usual = int(np.quantile(lengths, 0.95, method="higher")) if lengths else 0
    cut = sum(length > max_length for length in lengths)
    return Encoded(
        samples=samples, cut=cut, dropped=len(conversations) - len(samples), usual_length=usual
    )


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "prompt"
) -> np.ndarray:
    """Token ids int32 [N] of a conversation that waits for the assistant; `where` names its place for errors.

    Raises:
      ValueError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    _check_tokenizer(tokenizer)
    text = _apply_template(messages, tokenizer, prompt=True, where=where)
    return np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
    )


def describe_row(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, bool]]:
    """The sample's text for a person: consecutive pieces, each with whether its tokens count as labels."""
    ids = sample.tokens.tolist()
    borders = [0, *(np.flatnonzero(np.diff(sample.mask)) + 1).tolist(), len(ids)]
    # By prefixes, because some tokenizers drop the space before what they decode first.
    texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in borders]
    pieces = itertools.pairwise(zip(borders, texts, strict=True))
    return [
        (text[len(before) :], bool(sample.mask[start]))
        for (start, before), (end, text) in pieces
        if end > start
    ]


def _samples(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn,
    where: Sequence[str],
) -> Iterator[Sample]:
    """The samples of conversations, not cut."""
    _check_tokenizer(tokenizer)
    ends = _special_tokens(tokenizer)
    pairs = zip(conversations, where, strict=True)
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        texts, spans = [], []
        for messages, place in chunk:
            text = _apply_template(messages, tokenizer, prompt=False, where=place)
            texts.append(text)
            if loss_on == "assistant":
                spans.append(_assistant_spans(messages, text, tokenizer, ends=ends, where=place))
            else:
                spans.append([(0, len(text))])
        yield from _tokenize(texts, spans, tokenizer)


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    name = tokenizer.name_or_path or "this model"
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name} has no chat template; take an instruction-tuned checkpoint, "
            "or put a chat_template.jinja beside its tokenizer.json"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name} gives no offsets; take a checkpoint with a tokenizer.json"
        )


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens that may end a turn; some checkpoints name theirs in the vocabulary only."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    return tuple(filter(None, {*tokenizer.all_special_tokens, *added}))


def _assistant_spans(
    messages: Sequence[Message],
    text: str,
    tokenizer: Tokenizer,
    *,
    ends: tuple[str, ...],
    where: str,
) -> list[Span]:
    """The characters of the conversation's text that the assistant's turns fill.

    A turn begins behind the generation prompt, and ends with its end-of-turn token if it has one: white space that
    the template writes behind that belongs to nobody.
    """
    spans = []
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = _apply_template(messages[:turn], tokenizer, prompt=True, where=where)
        whole = turn + 1 == len(messages)
        through = (
            text
            if whole
            else _apply_template(messages[: turn + 1], tokenizer, prompt=False, where=where)
        )
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"{where}: the chat template writes the turns up to {turn + 1} otherwise when others follow, so the "
                "assistant's tokens cannot be told apart; use --data.loss_on all, or another chat template"
            )
        trimmed = through.rstrip()
        spans.append((len(before), len(trimmed) if trimmed.endswith(ends) else len(through)))
    return spans


def _apply_template(
    messages: Sequence[Message], tokenizer: Tokenizer, *, prompt: bool, where: str
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except (
        Exception
    ) as error:  # a template is a program of its own: whatever it raises is about this conversation
        raise ValueError(
            f"{where}: the chat template refuses this conversation: {error}"
        ) from error
    return str(text)


def _tokenize(
    texts: Sequence[str], spans: Sequence[list[Span]], tokenizer: Tokenizer
) -> Iterator[Sample]:
    # Special tokens are in the text already; verbose=False keeps quiet about texts that are cut later.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for ids, offsets, to_learn in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        yield Sample(
            np.asarray(ids, np.int32),
            _overlaps(np.asarray(offsets, np.int64).reshape(-1, 2), to_learn),
        )


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens hold a character of a span: bool [N], of offsets [N, 2].

    Byte-level tokenizers leave spaces out of a token's offsets, so that a token of spaces only is empty and stands
    behind them: its end can be trusted, its start lies at least one character before. The tokens of a character of
    several bytes all have that character's offsets.
    """
    ends = offsets[:, 1]
    starts = np.minimum(offsets[:, 0], ends - 1)
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (ends > start) & (starts < end)
    return mask


def _cut(sample: Sample, max_length: int) -> Sample:
    return Sample(sample.tokens[:max_length], sample.mask[:max_length])
