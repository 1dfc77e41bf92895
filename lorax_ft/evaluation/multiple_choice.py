"""Multiple choice: the letter after the prompt with the highest probability is the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.shapes import LETTERS
from lorax_ft.evaluation.benchmark import Benchmark
from lorax_ft.evaluation.next_token import BATCH_TOKENS, next_tokens
from lorax_ft.evaluation.prompts import PROMPTS, PromptFormat, PromptStyle, prompts_of
from lorax_ft.interop.encoding import run_tokenizer
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

TAIL = 32
"""Characters of a prompt's end that are tokenized with each letter."""
CHAT_TAIL = 8
"""Tokens of that end where a chat template writes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """The prompts of a benchmark as token ids."""

    prompts: tuple[np.ndarray, ...]
    letters: np.ndarray
    """The token id of each letter after a prompt, `[4]`."""
    subjects: tuple[str, ...]
    """The subject of each question."""
    categories: tuple[str, ...]
    answers: np.ndarray
    """The index of each correct letter, `[N]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a model chose."""

    log_probs: np.ndarray
    """The log-probability of each letter, `[N, 4]`."""
    answers: np.ndarray
    """The index of each correct letter, `[N]`."""

    @property
    def chosen(self) -> np.ndarray:
        """The index of the letter that the model chose, `[N]`; the first of equal ones."""
        return self.log_probs.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """1 where the model chose the correct letter, else 0, `[N]`."""
        return (self.chosen == self.answers).astype(np.float64)


def evaluate_choices(
    model: Model,
    params: Tree,
    encoded: Encoded,
    *,
    share: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda count: None,
) -> Choices:
    """Computes the log-probabilities of A to D after each prompt.

    Args:
      model: provides the decoder's config.
      params: parameters, with or without adapters.
      encoded: the questions, as `encode_benchmark` gives them.
      share: whether the shots of a subject are computed once. Otherwise they are computed for each
        question, which gives the same up to rounding.
      batch_tokens: tokens of a batch.
      advance: called with the number of questions that were computed.
    """
    targets = np.broadcast_to(encoded.letters, (len(encoded.prompts), len(LETTERS)))
    found = next_tokens(
        model,
        params,
        encoded.prompts,
        targets,
        groups=encoded.subjects if share else None,
        batch_tokens=batch_tokens,
        advance=advance,
    )
    return Choices(log_probs=found.log_probs, answers=encoded.answers)


def encode_benchmark(
    benchmark: Benchmark,
    model: Model,
    *,
    shots: int = 5,
    style: PromptStyle = "standard",
    chat: bool = False,
) -> Encoded:
    """Converts the questions of a benchmark to token ids.

    Args:
      benchmark: the questions.
      model: provides the tokenizer and the number of positions.
      shots: questions of dev that stand before each question.
      style: the wording, that of the benchmarks' own scripts (standard) or of
        lm-evaluation-harness (lm-eval).
      chat: whether a prompt is a user's message in the chat template, whose answer starts with the
        letter.

    Raises:
      ValueError: a prompt is longer than the model's positions (the error says how many shots would
        fit), the tokenizer has no token for a letter, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{model.source or 'the model'} has no tokenizer; use a checkpoint with a "
            "tokenizer.json"
        )
    prompt_format = PROMPTS[benchmark.format, style]
    texts: list[str] = []
    subjects: list[str] = []
    categories: list[str] = []
    answers: list[int] = []
    for subject in benchmark.subjects:
        texts += prompts_of(subject, prompt_format, shots=shots)
        for question in subject.questions:
            subjects.append(subject.name)
            categories.append(subject.category)
            answers.append(LETTERS.index(question.answer))
    # All prompts end alike, so the first one tells how letters follow any of them.
    encode = _encoder(model.tokenizer, texts[0], prompt_format, chat=chat)
    prompts = encode.prompts(texts)
    _check_fit(prompts, subjects, benchmark, encode, prompt_format, model=model, shots=shots)
    return Encoded(
        prompts=tuple(prompts),
        letters=encode.letters,
        subjects=tuple(subjects),
        categories=tuple(categories),
        answers=np.array(answers),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Encoder:
    """How prompts become token ids that each letter continues with one token."""

    tokenizer: Any
    chat: bool
    removed: int
    """Tokens at the end of a prompt that a letter changes."""
    added: tuple[int, ...]
    """What stands there instead, before any letter."""
    letters: np.ndarray

    def prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of prompts."""
        rows = _tokenize(self.tokenizer, texts, chat=self.chat)
        encoded = []
        for row in rows:
            kept = row[: len(row) - self.removed]
            encoded.append(np.concatenate([kept, np.array(self.added, np.int32)]))
        return encoded


def _encoder(tokenizer: Any, example: str, prompt_format: PromptFormat, *, chat: bool) -> _Encoder:
    """Finds out how a tokenizer writes the letters after a prompt, by the end of an example.

    A tokenizer may write a letter and the space before it as one token or as two, and may merge
    what stands before them.
    """
    # After a chat template's start of an answer there is no space.
    space, end = prompt_format.space, example[-TAIL:]
    if chat:
        (row,) = _tokenize(tokenizer, [example], chat=True)
        space, end = "", tokenizer.decode(row[-CHAT_TAIL:])
    before = _plain(tokenizer, end)
    after = [_plain(tokenizer, f"{end}{space}{letter}") for letter in LETTERS]
    # Where they differ, all letters must have one token, or their probabilities do not compare.
    common = _common(after)
    if any(len(tokens) != common + 1 for tokens in after):
        raise ValueError(
            f"the tokenizer does not write each of {', '.join(LETTERS)} after {end!r} as one token "
            f"of its own: {after}"
        )
    # Behind this, a letter changes how the end of the prompt is written.
    kept = min(_common([before, after[0]]), common)
    return _Encoder(
        tokenizer=tokenizer,
        chat=chat,
        removed=len(before) - kept,
        added=tuple(after[0][kept:common]),
        letters=np.array([tokens[-1] for tokens in after], np.int32),
    )


def _common(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all rows start with."""
    # Up to the end of the shortest row.
    for place, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(len(row) for row in rows)


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    ids: list[int] = run_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"]
    return ids


def _tokenize(tokenizer: Any, texts: Sequence[str], *, chat: bool) -> list[np.ndarray]:
    """The token ids of prompts, with the special tokens that the tokenizer starts a text with."""
    if chat:
        return [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    rows = run_tokenizer(tokenizer, list(texts))["input_ids"]
    encoded = []
    for row in rows:
        # T5's tokenizer, for one, ends each text, and nothing would follow.
        if row and row[-1] == tokenizer.eos_token_id:
            row = row[:-1]
        encoded.append(np.array(row, np.int32))
    return encoded


def _check_fit(
    prompts: Sequence[np.ndarray],
    subjects: Sequence[str],
    benchmark: Benchmark,
    encode: _Encoder,
    prompt_format: PromptFormat,
    *,
    model: Model,
    shots: int,
) -> None:
    """Raises ValueError if a prompt is longer than the model's positions."""
    positions = model.config.max_positions
    lengths = [len(prompt) for prompt in prompts]
    too_long = [name for name, length in zip(subjects, lengths, strict=True) if length > positions]
    if not too_long:
        return
    names = ", ".join(dict.fromkeys(too_long))
    message = (
        f"{len(too_long)} of {len(prompts)} questions do not fit in the model's {positions} "
        f"positions with {shots} shots: up to {max(lengths)} tokens, in {names}"
    )
    # Fewer shots help all subjects that are too long, so only these are tried.
    for fewer in range(shots - 1, -1, -1):
        texts: list[str] = []
        for subject in benchmark.subjects:
            if subject.name in too_long:
                texts += prompts_of(subject, prompt_format, shots=fewer)
        longest = max(map(len, encode.prompts(texts)))
        if longest <= positions:
            raise ValueError(f"{message}; {fewer} shots fit")
    raise ValueError(f"{message}; some do not fit even without shots: leave these subjects out")
