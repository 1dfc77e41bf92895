"""New tokens of a model: its tokenizer makes them of their texts, and its tables have their rows.

Letters: V vocabulary, D width, N new tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.interop.encoding import run_tokenizer
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.models.model import HEAD, TABLE, LoadedModel
from lorax_ft.tree import Tree

MULTIPLE = 64
"""A vocabulary grows to a multiple of it, so that meshes can still split the tables."""
Pieces = Mapping[int, Sequence[int]]
"""By the id of a new token, the tokens of which its text was made before."""


def add_tokens(model: LoadedModel, tokens: Sequence[str]) -> LoadedModel:
    """The model with new tokens. The tokenizer finds them anywhere in a text.

    A new token's row of the embedding, and its column of a head of its own, is the mean of those of
    the pieces of which the tokenizer made its text before. Rows that the tables have beyond the
    tokenizer's tokens are used first; then the tables grow, to a multiple of 64 rows.

    Args:
      model: a loaded model with its tokenizer, which is copied.
      tokens: the texts, each of one token.

    Raises:
      ValueError: the model has no tokenizer, a text is empty or a token already, or is there twice.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.source} holds no tokenizer to add tokens to")
    from transformers import AddedToken

    if not tokens:
        return model
    _check_new(tokens, model.tokenizer)
    tokenizer = copy.deepcopy(model.tokenizer)
    # A normalizer that writes ▁ for spaces would hide them behind another character.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in tokens])
    return _with_tokenizer(model, tokenizer, tokens, spare_rows="start")


def with_tokens_of(folder: str | Path, model: LoadedModel) -> LoadedModel:
    """The model with the tokenizer of an adapter's folder, where that has further tokens.

    The adapter has the rows of the tokens that it trained. Rows that the tables had to spare stay
    as they are otherwise, as in PEFT; rows by which they grow start as in `add_tokens`.

    Raises:
      ValueError: the folder's tokenizer cannot be read, or is another model's.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or model.tokenizer is None or len(tokenizer) <= len(model.tokenizer):
        return model
    own = model.tokenizer.get_vocab()
    there = tokenizer.get_vocab()
    for text, number in own.items():
        if there.get(text) != number:
            raise ValueError(
                f"the tokenizer in {folder} has further tokens, but is not that of {model.source} "
                f"with new ones: {text!r} is token {number} of the model"
            )
    further = [text for text in there if text not in own]
    return _with_tokenizer(model, tokenizer, further, spare_rows="keep")


def _check_new(tokens: Sequence[str], tokenizer: Any) -> None:
    """Raise for texts that are no new tokens."""
    vocabulary = tokenizer.get_vocab()
    seen = set()
    for text in tokens:
        if not text.strip():
            problem = "has no text"
        elif text in seen:
            problem = "is given twice"
        elif text in vocabulary:
            problem = "is a token already; adapter.trainable_tokens trains it"
        else:
            seen.add(text)
            continue
        raise ValueError(f"data.new_tokens: {text!r} {problem}")


def _with_tokenizer(
    model: LoadedModel,
    tokenizer: Any,
    tokens: Sequence[str],
    *,
    spare_rows: Literal["start", "keep"],
) -> LoadedModel:
    """The model with a tokenizer that has these new tokens, some of them in rows to spare."""
    vocabulary = tokenizer.get_vocab()
    size = model.config.vocab_size
    needed = max(vocabulary[text] for text in tokens) + 1
    pieces = {}
    for text in tokens:
        token = vocabulary[text]
        ids = run_tokenizer(model.tokenizer, text, add_special_tokens=False)["input_ids"]
        # A normalizer may leave nothing of a text, which then has no mean.
        if ids and (token >= size or spare_rows == "start"):
            pieces[token] = ids
    if needed > size:
        size = -(-needed // MULTIPLE) * MULTIPLE
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, vocab_size=size),
        hf_config={**model.hf_config, "vocab_size": size},
        params=_with_means(model.params, pieces, size=size),
        tokenizer=tokenizer,
    )


def _with_means(params: Tree, pieces: Pieces, *, size: int) -> Tree:
    """The parameters with tables of `size` rows, in which each new token is its pieces' mean."""
    grow = jax.jit(functools.partial(_grown, pieces=pieces, size=size))
    table = params[TABLE] | {"embedding": grow(params[TABLE]["embedding"])}
    grown = params | {TABLE: table}
    if HEAD in params:
        kernel = grow(params[HEAD]["kernel"].T)
        grown[HEAD] = params[HEAD] | {"kernel": kernel.T}
    return grown


def _grown(table: Array, *, pieces: Pieces, size: int) -> Array:
    """A table `[V, D]` with `size` rows, of which the new tokens have their pieces' mean."""
    means = []
    for ids in pieces.values():
        rows = table[np.asarray(ids)].astype(jnp.float32)
        means.append(rows.mean(0).astype(table.dtype))
    # No token has the rest of the rows. With the mean row, they are as unlikely as most tokens.
    mean = table.astype(jnp.float32).mean(0).astype(table.dtype)
    rest = jnp.broadcast_to(mean, (size - len(table), len(mean)))
    grown = jnp.concatenate([table, rest])
    if not means:
        return grown
    return grown.at[np.asarray(list(pieces))].set(jnp.stack(means))
