"""Converts conversations to samples: token ids from the chat template, and the loss mask.

Letters: N tokens of a sample.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from lorax_ft.data.conversation import Conversation, Message

LossOn = Literal["assistant", "all"]
Tokenizer = Any
"""A transformers tokenizer. The type is not named, so that importing this module stays cheap."""
Span = tuple[int, int]
"""Start and end of a range of characters, the end exclusive."""

# Conversations per tokenizer call: enough to keep all cores busy, few enough to keep the
# character offsets, which take far more memory than the tokens, small.
_CHUNK = 1024


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
    """The samples of many conversations, and how many were truncated or dropped."""

    samples: list[Sample]
    cut: int
    """Conversations longer than `max_length`."""
    dropped: int
    """Conversations without a label, usually because it was truncated; they have no sample."""
    usual_length: int
    """Length in tokens that 95 % of the conversations do not exceed."""


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "assistant",
    where: str = "conversation",
) -> Sample:
    """Converts one conversation to a sample, truncated to `max_length` tokens.

    A token counts as a label if it contains text of an assistant turn: what the template writes
    after the generation prompt, up to and including the end-of-turn token. The conversation is
    tokenized in one piece, so the tokens are the ones that the template produces.

    Raises:
      ValueError: the tokenizer has no chat template or no character offsets, or the template
        rejects the conversation, or it renders the first turns differently when more turns
        follow (then the assistant turns cannot be located).
    """
    samples = _encode_untruncated([messages], tokenizer, loss_on=loss_on, where=[where])
    return _truncate(next(samples), max_length)


def encode_all(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "assistant",
    where: Sequence[str],
) -> Encoded:
    """Converts conversations to samples, in order; `where` names each one's place in errors.

    Raises:
      ValueError: as `encode`, or no sample keeps a label.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    for sample in _encode_untruncated(conversations, tokenizer, loss_on=loss_on, where=where):
        lengths.append(len(sample))
        truncated = _truncate(sample, max_length)
        # The first token is never a target: no token before it predicts it.
        if truncated.mask[1:].any():
            samples.append(truncated)
    if conversations and not samples:
        raise ValueError(
            f"none of the {len(conversations)} samples keeps a label within {max_length} tokens; "
            "raise data.max_length"
        )
    usual_length = 0
    if lengths:
        usual_length = int(np.quantile(lengths, 0.95, method="higher"))
    return Encoded(
        samples=samples,
        cut=sum(length > max_length for length in lengths),
        dropped=len(conversations) - len(samples),
        usual_length=usual_length,
    )


def encode_prompt(
    conversation: Conversation | Sequence[Message], tokenizer: Tokenizer, *, where: str = "prompt"
) -> np.ndarray:
    """Converts a conversation to token ids, int32 [N], ready for the assistant's next turn.

    `where` names the conversation's place in errors.

    Raises:
      ValueError: the tokenizer has no chat template, or the template rejects the conversation.
    """
    _check_tokenizer(tokenizer)
    if not isinstance(conversation, Conversation):
        conversation = Conversation(messages=list(conversation))
    variables = {
        "tools": conversation.tools,
        "documents": conversation.documents,
        **conversation.template_args,
    }
    text = _apply_template(
        conversation.messages, tokenizer, prompt=True, where=where, variables=variables
    )
    # The template writes the special tokens, the beginning-of-sequence token included.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], np.int32)


def describe_row(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, bool]]:
    """Splits a sample's text for display into pieces, each with whether its tokens are labels."""
    ids = sample.tokens.tolist()
    if not ids:
        return []
    changes = np.flatnonzero(np.diff(sample.mask)) + 1
    borders = [0, *changes.tolist(), len(ids)]
    pieces = []
    before = ""
    for start, end in itertools.pairwise(borders):
        # Decode the whole prefix: some tokenizers drop the space before the first token they get.
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], bool(sample.mask[start])))
        before = text
    return pieces


def _encode_untruncated(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn,
    where: Sequence[str],
) -> Iterator[Sample]:
    _check_tokenizer(tokenizer)
    end_tokens = _special_tokens(tokenizer)
    pairs = zip(conversations, where, strict=True)
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        texts = []
        label_spans = []
        for messages, place in chunk:
            text = _apply_template(messages, tokenizer, prompt=False, where=place)
            spans = [(0, len(text))]
            if loss_on == "assistant":
                spans = _assistant_spans(messages, text, tokenizer, end_tokens, place)
            texts.append(text)
            label_spans.append(spans)
        yield from _tokenize(texts, label_spans, tokenizer)


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    name = tokenizer.name_or_path or "this model"
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name} has no chat template; use an instruction-tuned checkpoint, "
            "or put a chat_template.jinja next to its tokenizer.json"
        )
    # Only the tokenizers of the Rust library return the offsets that locate assistant turns.
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name} returns no character offsets; "
            "use a checkpoint with a tokenizer.json"
        )


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the tokens that may end a turn."""
    tokens = set(tokenizer.all_special_tokens)
    # Some checkpoints declare their end-of-turn token in the vocabulary only.
    for token in tokenizer.added_tokens_decoder.values():
        tokens.add(str(token))
    tokens.discard("")  # every text ends with the empty string
    return tuple(tokens)


def _assistant_spans(
    messages: Sequence[Message],
    text: str,
    tokenizer: Tokenizer,
    end_tokens: tuple[str, ...],
    where: str,
) -> list[Span]:
    """Returns the characters of the rendered conversation that the assistant's turns cover.

    A turn starts after the generation prompt. It ends with its end-of-turn token if it has one:
    white space that the template writes after that token belongs to no turn.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply_template(messages[:turn], tokenizer, prompt=True, where=where)
        through = text
        is_last = turn + 1 == len(messages)
        if not is_last:
            through = _apply_template(messages[: turn + 1], tokenizer, prompt=False, where=where)
        # Some templates rewrite earlier turns, for example to drop reasoning from old answers.
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"{where}: the chat template renders the turns up to {turn + 1} differently when "
                "more turns follow, so the assistant's tokens cannot be located; "
                "use --data.loss_on all, or another chat template"
            )
        end = len(through)
        trimmed = through.rstrip()
        if trimmed.endswith(end_tokens):
            end = len(trimmed)
        spans.append((len(before), end))
    return spans


def _apply_template(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    prompt: bool,
    where: str,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Renders a conversation, with the generation prompt at its end if `prompt`."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **variables
        )
    # A template is a program of its own, and may raise anything about this conversation.
    except Exception as error:
        raise ValueError(
            f"{where}: the chat template rejects this conversation: {error}"
        ) from error
    return str(text)


def _tokenize(
    texts: Sequence[str], label_spans: Sequence[Sequence[Span]], tokenizer: Tokenizer
) -> Iterator[Sample]:
    # The texts contain their special tokens already. Without verbose=False, transformers warns
    # about every text that is longer than the model's context; those are truncated later.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    columns = zip(encoded["input_ids"], encoded["offset_mapping"], label_spans, strict=True)
    for ids, offsets, spans in columns:
        # The reshape gives an empty conversation's offsets their second axis: [0] to [0, 2].
        offsets_array = np.asarray(offsets, np.int64).reshape(-1, 2)
        yield Sample(np.asarray(ids, np.int32), _overlaps(offsets_array, spans))


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Returns which tokens contain a character of a span, bool [N], from offsets [N, 2].

    Byte-level tokenizers leave spaces out of a token's offsets, so a token of spaces only has an
    empty range after them: its end is reliable, and its start is at least one character earlier.
    If a character of several bytes is split into several tokens, each of them has the offsets of
    the whole character.
    """
    ends = offsets[:, 1]
    starts = np.minimum(offsets[:, 0], ends - 1)
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (ends > start) & (starts < end)
    return mask


def _truncate(sample: Sample, max_length: int) -> Sample:
    return Sample(sample.tokens[:max_length], sample.mask[:max_length])
