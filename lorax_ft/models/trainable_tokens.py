"""Trainable tokens of a decoder: which tokens they are, and where their leaves lie."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lorax_ft.lowrank.spec import base_kernel
from lorax_ft.lowrank.terms import is_adapted
from lorax_ft.lowrank.terms.tokens import TERM, leaves_of_head, leaves_of_table
from lorax_ft.models.model import HEAD, TABLE, CausalLM
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import leaf_name
from lorax_ft.tree import Tree, from_modules, modules, split


def add_trainable_tokens(params: Tree, ids: Sequence[int] | np.ndarray, model: CausalLM) -> Tree:
    """The parameters with rows of their own for a few tokens, which train while the rest stays.

    The rows are those of the embedding and, where the head is not tied to it, the head's columns.
    They start as the model's own.

    Args:
      params: the model's, with or without adapters.
      ids: of the tokens, `[N]`.
      model: the decoder.

    Returns:
      A new tree, with `embed_tokens/token_rows` `[N, D]` and, for a head of its own,
      `lm_head/token_columns` `[D, N]`.

    Raises:
      ValueError: there are no ids, the vocabulary has not all of them, or the embedding or the head
        is adapted.

    Source: PEFT's `trainable_token_indices`.
    """
    unique = np.unique(np.asarray(ids))
    vocabulary = model.config.vocab_size
    if not len(unique):
        raise ValueError("there are no tokens to train")
    if not np.issubdtype(unique.dtype, np.integer):
        raise ValueError(f"the tokens to train are {ids}; they must be ids")
    if unique[0] < 0 or unique[-1] >= vocabulary:
        wrong = unique[0] if unique[0] < 0 else unique[-1]
        raise ValueError(f"token {wrong} is not one of the model's {vocabulary} tokens")
    layers = modules(params)
    for path in (TABLE, HEAD):
        if is_adapted(layers.get(path, {})):
            raise ValueError(
                f"{path} has an adapter already, so none of its tokens can train alone; leave it "
                "out of adapter.targets"
            )
    order = jnp.asarray(unique, jnp.int32)
    layers[TABLE] = layers[TABLE] | leaves_of_table(layers[TABLE]["embedding"], order)
    # A tied head has no leaves of its own: it takes the embedding's.
    if HEAD in layers:
        kernel = base_kernel(layers, HEAD, model.layout[HEAD])
        assert not isinstance(kernel, Quantized)
        layers[HEAD] = layers[HEAD] | leaves_of_head(kernel, order)
    return from_modules(layers)


def trainable_tokens_of(params: Tree) -> tuple[Tree, Tree]:
    """The leaves of trainable tokens, and all others."""
    return split(params, lambda path: leaf_name(path) in TERM.all_leaves)
