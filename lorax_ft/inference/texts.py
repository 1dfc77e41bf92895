"""Texts from a model: answers in conversations, as a whole or as they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import Array

from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.formats import Message
from lorax_ft.inference.generate import GREEDY, check_prompts, stream, with_all_norms
from lorax_ft.inference.sampling import Sampling
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

STOP_CHUNK = 16  # tokens between two looks at the text
BROKEN = "\ufffd"  # how a character's first bytes are decoded


def answer(
    model: Model,
    params: Tree,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    key: Array | None = None,
    where: Sequence[str] | None = None,
) -> list[str]:
    """The assistant's next turn in each conversation, as stripped text without special tokens.

    Args:
      model: gives the tokenizer too.
      params: parameters, with or without adapters.
      conversations: messages that wait for the assistant.
      max_new_tokens: the longest answer.
      batch_size: answers at once; the prompts are taken by length, the longest first.
      sampling: how a token is chosen.
      stop_ids: tokens that end an answer; None takes `default_stop_ids`.
      stop_strings: texts that end an answer, and are left out.
      key: for drawing.
      where: the place of each conversation, for errors; None counts them.

    Raises:
      ValueError: as `generate`, or the tokenizer or its chat template is missing, or refuses a conversation. All
        conversations are checked before the first is answered.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{model.source or 'the model'} has no tokenizer; take a checkpoint with a tokenizer.json"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be above 0")
    where = where or [f"prompt {number}" for number in range(1, len(conversations) + 1)]
    pairs = zip(conversations, where, strict=True)
    prompts = [encode_prompt(messages, model.tokenizer, where=place) for messages, place in pairs]
    check_prompts(prompts, max_new_tokens, model.config, where=where)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = min(batch_size, len(order))
    params = with_all_norms(params)
    answers = [""] * len(prompts)
    for start in range(0, len(order), size or 1):
        chosen = order[start : start + size]
        *_, last = stream_texts(
            model,
            params,
            [prompts[i] for i in chosen]
            + [prompts[chosen[-1]]] * (size - len(chosen)),  # one shape for all
            max_new_tokens=max_new_tokens,
            chunk=STOP_CHUNK if stop_strings else max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            key=None if key is None else jax.random.fold_in(key, start),
        )
        for i, text in zip(chosen, last, strict=False):
            answers[i] = text.strip()
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
) -> Iterator[list[str]]:
    """`stream`, as texts without special tokens, which end before the first of `stop_strings`.

    Each text begins with the one before it: an end that may be the beginning of a stop string, or of a character,
    is held back until that is decided.
    """
    if "" in stop_strings:
        raise ValueError("a stop string is empty, and would end every text where it begins")
    shown, texts = [""] * len(prompts), [""] * len(prompts)
    found = stream(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        sampling=sampling,
        stop_ids=stop_ids,
        key=key,
    )
    for rows in found:
        decode = model.tokenizer.decode
        whole = [
            decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in rows
        ]
        ends = [_end(text, stop_strings) for text in whole]
        texts = [text[:end] for text, end in zip(whole, ends, strict=True)]
        if texts and None not in ends:
            break
        settled = [
            t if end is not None else _settled(t, stop_strings)
            for t, end in zip(texts, ends, strict=True)
        ]
        shown = _grown(shown, settled)
        yield shown
    yield _grown(shown, texts)


def _grown(shown: list[str], texts: list[str]) -> list[str]:
    """The texts, but those as they were shown that do not go on from there.

    A byte-level decoder takes a whole character back where the next one is not whole yet (tokenizers' ByteFallback).
    """
    return [new if new.startswith(old) else old for old, new in zip(shown, texts, strict=True)]


def _end(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, or None."""
    found = [(start + len(stop), start) for stop in stop_strings if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """The text without an end that may yet become a stop string or another character.

    >>> _settled("1 + 1\\n\\nQ", ["\\n\\nQuestion", "###"]), _settled("1 + 1\\n", [])
    ('1 + 1', '1 + 1\\n')
    """
    text = text.rstrip(BROKEN)
    starts = [stop[:n] for stop in stop_strings for n in range(1, len(stop))]
    return text[
        : len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
    ]
