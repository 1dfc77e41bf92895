"""Generation from conversations to text, complete or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.inference.generate import GREEDY, check_prompts, stream, with_all_norms
from lorax_ft.inference.sampling import Sampling
from lorax_ft.models.model import Model
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Tree

# Tokens between two searches for stop strings: each search decodes the whole text on the host.
STOP_CHUNK = 16
# U+FFFD, what a tokenizer decodes the first bytes of an incomplete character to.
REPLACEMENT = "\ufffd"


def answer(
    model: Model,
    params: Tree,
    conversations: Sequence[Conversation | Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    key: Array | None = None,
    where: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Generates the assistant's next turn in each conversation.

    Args:
      model: also provides the tokenizer.
      params: parameters, with or without adapters.
      conversations: messages up to the assistant's next turn, or such conversations with tools,
        documents or template variables.
      max_new_tokens: maximum number of tokens of each answer.
      batch_size: number of answers that are generated at once.
      sampling: how the next token is chosen.
      stop_ids: token ids that end an answer; None takes `default_stop_ids`.
      stop_strings: strings that end an answer; the answer does not include them.
      key: random key for sampling.
      where: the source of each conversation, for errors; None numbers them.
      advance: called with the number of answers that were generated.

    Returns:
      The answers, without special tokens and without whitespace at both ends.

    Raises:
      ValueError: as in `generate`; or the model has no tokenizer, the tokenizer has no chat
        template, or the template rejects a conversation. All conversations are checked before the
        first answer is generated.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be above 0")
    prompts = _encode_prompts(
        model, conversations, where, max_new_tokens=max_new_tokens, virtual=virtual_tokens(params)
    )
    params = with_all_norms(model, params)
    # Only a stop string needs the text before its end.
    chunk = STOP_CHUNK if stop_strings else max_new_tokens
    answers = [""] * len(prompts)
    for start, rows, batch in _batches(prompts, batch_size):
        *_, texts = stream_texts(
            model,
            params,
            batch,
            max_new_tokens=max_new_tokens,
            chunk=chunk,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            key=None if key is None else jax.random.fold_in(key, start),
        )
        # The texts of the rows that pad the batch are left.
        for i, text in zip(rows, texts, strict=False):
            answers[i] = text.strip()
        advance(len(rows))
    return answers


def stream_texts(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    chunk: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    key: Array | None = None,
    special: Literal["skip", "keep"] = "skip",
) -> Iterator[list[str]]:
    """Like `stream`, but yields texts.

    Each text starts with the previous one. An end that may be the start of a stop string, or an
    incomplete character, is held back until that is known.

    Args:
      model: this and the other arguments are those of `stream`.
      stop_strings: strings that end a text; the text does not include them.
      special: whether the texts leave out special tokens, or keep those before the stop id.
    """
    if "" in stop_strings:
        raise ValueError("a stop string is empty, so every text would end before its first token")
    options: dict[str, Any] = {"sampling": sampling, "stop_ids": stop_ids, "key": key}
    shown = [""] * len(prompts)
    texts = shown
    for rows in stream(
        model, params, prompts, max_new_tokens=max_new_tokens, chunk=chunk, **options
    ):
        texts, stable, finished = [], [], []
        for row in rows:
            text = model.tokenizer.decode(
                row, skip_special_tokens=special == "skip", clean_up_tokenization_spaces=False
            )
            end = _stop_position(text, stop_strings)
            texts.append(text[:end])
            finished.append(end is not None)
            stable.append(text[:end] if end is not None else _stable_prefix(text, stop_strings))
        if texts and all(finished):
            break
        shown = _extended(shown, stable)
        yield shown
    # No more tokens follow, so the ends that were held back belong to the texts.
    yield _extended(shown, texts)


def _encode_prompts(
    model: Model,
    conversations: Sequence[Conversation | Sequence[Message]],
    where: Sequence[str] | None,
    *,
    max_new_tokens: int,
    virtual: int,
) -> list[np.ndarray]:
    """The token ids of each conversation, all of which the model can continue."""
    if model.tokenizer is None:
        raise ValueError(
            f"{model.source or 'the model'} has no tokenizer; use a checkpoint with a "
            "tokenizer.json"
        )
    if where is None:
        where = [f"prompt {number}" for number in range(1, len(conversations) + 1)]
    prompts = []
    for conversation, place in zip(conversations, where, strict=True):
        prompts.append(encode_prompt(conversation, model.tokenizer, where=place))
    check_prompts(prompts, max_new_tokens, model.config, where=where, virtual=virtual)
    return prompts


def _batches(
    prompts: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[int, list[int], list[np.ndarray]]]:
    """Yields the place of a batch's first row, the indices of its rows, and its prompts."""
    # A batch is padded to its longest prompt, so prompts of similar length share one. The longest
    # come first: if memory runs out, it does so in the first batch.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = min(batch_size, len(prompts))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        # The last batch is padded to the same size: another size would compile another program.
        batch += batch[-1:] * (size - len(rows))
        yield start, rows, batch


def _extended(shown: list[str], texts: list[str]) -> list[str]:
    """The new texts, except those that do not start with what was shown: these stay as shown.

    A byte-level decoder may withdraw a complete character while the next one is incomplete
    (ByteFallback in tokenizers).
    """
    return [new if new.startswith(old) else old for old, new in zip(shown, texts, strict=True)]


def _stop_position(text: str, stop_strings: Sequence[str]) -> int | None:
    """The start of the stop string that is complete first, or None if there is none."""
    matches = []
    for stop in stop_strings:
        start = text.find(stop)
        if start >= 0:
            matches.append((start + len(stop), start))
    if not matches:
        return None
    # The earliest end, not the earliest start: decoding token by token would stop there.
    _, start = min(matches)
    return start


def _stable_prefix(text: str, stop_strings: Sequence[str]) -> str:
    """The text without an end that may become a stop string or another character.

    >>> _stable_prefix("1 + 1\\n\\nQ", ["\\n\\nQuestion", "###"])
    '1 + 1'
    >>> _stable_prefix("1 + 1\\n", [])
    '1 + 1\\n'
    """
    text = text.rstrip(REPLACEMENT)
    held_back = 0
    for stop in stop_strings:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                held_back = max(held_back, length)
    return text[: len(text) - held_back]
