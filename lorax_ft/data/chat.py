"""Converts the rows of a dataset to samples: token ids, and which of them count in the loss.

Letters: N tokens of a sample.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from lorax_ft.data.conversation import (
    Conversation,
    Example,
    Message,
    PlainText,
    as_conversation,
    texts_of,
)
from lorax_ft.data.located import LossOn, ReasoningLoss, Turn
from lorax_ft.data.marks import Span
from lorax_ft.data.masks import TurnFinder
from lorax_ft.data.template import Tokenizer, check_tokenizer
from lorax_ft.interop.encoding import run_tokenizer

LONGEST_EXAMPLE = 4_000_000
"""Characters of an example, about a million tokens. Tokenizing takes 400 bytes for each."""
ControlTokens = Literal["refuse", "keep"]
"""What happens to a conversation with a special token in one of its texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One example as the model sees it."""

    tokens: np.ndarray
    """Token ids, int32 [N]."""
    mask: np.ndarray
    """Whether a token counts as a label, bool [N]."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Text:
    """An example as text, before it is tokenized."""

    text: str
    labels: list[Span]
    """The characters whose tokens count in the loss."""
    special_tokens: bool = False
    """Whether the tokenizer adds its special tokens, such as the beginning-of-sequence token."""
    ends: bool = False
    """Whether the end-of-sequence token follows, as a label."""


def encode(
    example: Example | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "assistant",
    reasoning_loss: ReasoningLoss = "data",
    append_end: bool = False,
    control_tokens: ControlTokens = "refuse",
    where: str = "conversation",
) -> Sample:
    """Converts one example to a sample, truncated to `max_length` tokens.

    In a conversation, a token counts as a label if it contains text of an assistant turn: what the
    template writes after the generation prompt, up to and including the end-of-turn token. In
    plain text, all tokens after the prompt count. The example is tokenized in one piece, so the
    tokens are the ones that the template produces.

    Args:
      example: a conversation (or its messages), or plain text.
      tokenizer: a transformers tokenizer that returns character offsets.
      max_length: the largest number of tokens.
      loss_on: the tokens that count: the assistant's turns, only the last of them, or all.
      reasoning_loss: which reasoning counts: what the data has; all, also an empty thought that
        the template writes; or none.
      append_end: append the end-of-sequence token where the template ends without one.
      control_tokens: whether texts of a conversation may contain the tokenizer's special tokens.
      where: the place of the example, for errors.

    Raises:
      ValueError: the tokenizer has no chat template or no character offsets, a text contains a
        special token or is too long, or the template rejects the conversation or does not write a
        turn of the assistant, or it changes the texts so that the assistant's turns cannot be
        located.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        loss_on=loss_on,
        reasoning_loss=reasoning_loss,
        append_end=append_end,
        control_tokens=control_tokens,
    )
    if not isinstance(example, PlainText):
        example = as_conversation(example)
    (sample,) = encoder.encode([(example, where)]).samples()
    return Sample(sample.tokens[:max_length], sample.mask[:max_length])


def encode_prompt(
    conversation: Conversation | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    where: str = "prompt",
) -> np.ndarray:
    """Converts a conversation to token ids, int32 [N], ready for the assistant's next turn.

    `where` names the conversation's place in errors.

    Raises:
      ValueError: the tokenizer has no chat template, or the template rejects the conversation.
    """
    check_tokenizer(tokenizer)
    text = TurnFinder(tokenizer).prompt(as_conversation(conversation), where=where)
    # The template writes the special tokens, the beginning-of-sequence token included.
    encoded = run_tokenizer(tokenizer, text, add_special_tokens=False)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Samples one behind the other, and what was counted while they were made."""

    tokens: np.ndarray
    """Token ids of all samples, int32 [N]."""
    mask: np.ndarray
    """Whether they count as labels, bool [N]."""
    lengths: np.ndarray
    """Tokens of each sample, int64 [samples]."""
    endless: int
    """Trained turns that end without an end-of-turn token."""
    unwritten: Mapping[str, int]
    """Texts that the template did not write, with the number of examples."""
    bad: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """What is wrong with examples that could not be encoded, by number; their samples are empty."""

    def samples(self) -> Iterator[Sample]:
        """Yields the samples."""
        stop = 0
        for length in self.lengths.tolist():
            start, stop = stop, stop + length
            yield Sample(self.tokens[start:stop], self.mask[start:stop])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Converts examples to samples; see `encode` for the options.

    `skip_bad` leaves examples that cannot be encoded empty, instead of an error.
    """

    tokenizer: Tokenizer
    loss_on: LossOn = "assistant"
    reasoning_loss: ReasoningLoss = "data"
    append_end: bool = False
    control_tokens: ControlTokens = "refuse"
    skip_bad: bool = False

    def encode(self, examples: Sequence[tuple[Example, str]]) -> Encoded:
        """Converts examples, each with its place, to samples of any length.

        Raises:
          ValueError: as `encode`.
        """
        writer = _Writer(self)
        texts = []
        bad: dict[int, str] = {}
        for number, (example, where) in enumerate(examples):
            try:
                texts.append(writer.text(example, where))
            except ValueError as error:
                if not self.skip_bad:
                    raise
                bad[number] = str(error)
                texts.append(_Text("", []))
        samples = list(_tokenize(texts, self.tokenizer))
        empty = Sample(np.zeros(0, np.int32), np.zeros(0, np.bool_))
        return Encoded(
            tokens=np.concatenate([empty.tokens, *(sample.tokens for sample in samples)]),
            mask=np.concatenate([empty.mask, *(sample.mask for sample in samples)]),
            lengths=np.array([len(sample) for sample in samples], np.int64),
            endless=writer.endless,
            unwritten=writer.unwritten,
            bad=bad,
        )


class _Writer:
    """Writes examples as text with the options of an encoder, and counts what is noteworthy."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._finder: TurnFinder | None = None
        self.endless = 0
        self.unwritten: collections.Counter[str] = collections.Counter()

    def text(self, example: Example, where: str) -> _Text:
        """The text of an example, and where its labels stand."""
        _check_size(example, where)
        if isinstance(example, Conversation):
            return self._conversation(example, where)
        check_tokenizer(self._encoder.tokenizer, chat=False)
        start = 0
        if self._encoder.loss_on != "all":
            start = len(example.prompt)
        text = example.prompt + example.completion
        return _Text(text, [(start, len(text))], special_tokens=True, ends=True)

    def _conversation(self, conversation: Conversation, where: str) -> _Text:
        if self._finder is None:
            check_tokenizer(self._encoder.tokenizer)
            self._finder = TurnFinder(self._encoder.tokenizer)
        if self._encoder.control_tokens == "refuse":
            self._finder.check_texts(conversation, where=where)
        all_count = self._encoder.loss_on == "all" and self._encoder.reasoning_loss != "none"
        if all_count and all(message.get("train", True) for message in conversation.messages):
            located = self._finder.text(conversation, where=where)
        else:
            located = self._finder.locate(conversation, where=where)
        spans = located.label_spans(
            conversation, loss_on=self._encoder.loss_on, reasoning=self._encoder.reasoning_loss
        )
        self.unwritten.update(set(located.unwritten))
        trained = _trained(located.turns, spans)
        endless = [turn for turn in trained if not turn.has_end]
        ends = self._encoder.append_end and bool(endless) and trained[-1] is endless[-1]
        self.endless += len(endless) - ends
        return _Text(located.text, spans, ends=ends)


def _check_size(example: Example, where: str) -> None:
    """Raise for a text that takes gigabytes of memory to tokenize."""
    if isinstance(example, PlainText):
        size = len(example.prompt) + len(example.completion)
    else:
        size = sum(len(text) for _, text in texts_of(example))
    if size > LONGEST_EXAMPLE:
        raise ValueError(
            f"{where}: the row has {size:,} characters of text, more than {LONGEST_EXAMPLE:,}; "
            "split it into several rows"
        )


def _trained(turns: Sequence[Turn], spans: Sequence[Span]) -> list[Turn]:
    """The turns that share a character with one of the spans."""
    ranges = [span for turn in turns for span in turn.spans]
    touched = iter(_touch(np.array(ranges).reshape(-1, 2), spans).tolist())
    trained = []
    for turn in turns:
        # A list, since each turn takes as many as it has spans.
        if any([next(touched) for _ in turn.spans]):
            trained.append(turn)
    return trained


def _tokenize(texts: Sequence[_Text], tokenizer: Tokenizer) -> Iterator[Sample]:
    """Tokenizes examples, which are all conversations or all plain text."""
    for special_tokens, group in itertools.groupby(texts, key=lambda text: text.special_tokens):
        group_texts = list(group)
        encoded = run_tokenizer(
            tokenizer,
            [text.text for text in group_texts],
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
        )
        columns = zip(encoded["input_ids"], encoded["offset_mapping"], group_texts, strict=True)
        for ids, offsets, text in columns:
            # The reshape gives an empty text's offsets their second axis: [0] to [0, 2].
            offsets_array = np.asarray(offsets, np.int64).reshape(-1, 2)
            mask = _overlaps(offsets_array, text.labels)
            sample = Sample(np.asarray(ids, np.int32), mask)
            yield _with_end(sample, tokenizer) if text.ends else sample


def _with_end(sample: Sample, tokenizer: Tokenizer) -> Sample:
    """The sample with the end-of-sequence token as its last label."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-sequence "
            "token, which has to follow plain text; set eos_token in its tokenizer_config.json"
        )
    if len(sample) and sample.tokens[-1] == end:
        tokens, mask = sample.tokens, sample.mask.copy()
    else:
        tokens = np.append(sample.tokens, np.int32(end))
        mask = np.append(sample.mask, True)
    mask[-1] = True
    return Sample(tokens, mask)


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Returns which tokens contain a character of a span, bool [N], from offsets [N, 2].

    Byte-level tokenizers leave spaces out of a token's offsets, so a token of spaces only has an
    empty range after them: its end is reliable, and its start is at least one character earlier.
    If a character of several bytes is split into several tokens, each of them has the offsets of
    the whole character.
    """
    ends = offsets[:, 1]
    starts = np.minimum(offsets[:, 0], ends - 1)
    ranges = np.stack([starts, ends], axis=1)
    return _touch(ranges, spans)


def _touch(ranges: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Returns which of the ranges [N, 2] share a character with one of the spans, bool [N]."""
    if not spans:
        return np.zeros(len(ranges), np.bool_)
    starts, ends = np.array(sorted(spans)).T
    furthest_ends = np.maximum.accumulate(ends)
    # Of the spans that start before a range ends, the one that ends last decides.
    count = np.searchsorted(starts, ranges[:, 1])
    touched: np.ndarray = (count > 0) & (furthest_ends[count - 1] > ranges[:, 0])
    return touched
