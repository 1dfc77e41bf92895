"""Activated LoRA (2504.12397): an adapter that acts from an invocation sequence on, not before it.

The tokens before it are computed by the base alone, so that their keys and values can be those that
the base has already. Shapes: B batch, T tokens, K tokens of the invocation.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.terms import kept_start, low_rank, magnitude
from lorax_ft.lowrank.terms.low_rank import INVOCATION, ROWS
from lorax_ft.tree import Tree, combine, from_modules, modules


def with_invocation(params: Tree, tokens: Sequence[int] | np.ndarray) -> Tree:
    """The parameters with the invocation sequence of their LoRA, at the tree's root.

    Args:
      params: the parameters of a decoder of this library, before or after `add_adapters`.
      tokens: the invocation's token ids, `[K]`; the last place in a sample where they stand counts.

    Raises:
      ValueError: there are no tokens or no ids, or the parameters have an invocation already.
    """
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise ValueError("the invocation has no tokens")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise ValueError(f"the invocation is {tokens}; it must be a list of token ids")
    return combine(params, {INVOCATION: jnp.asarray(ids, jnp.int32)})


def active_rows(tokens: Array, invocation: Array, segment_ids: Array | None = None) -> Array:
    """Whether LoRA acts in each token, `[B, T]`: from the start of a sample's last invocation on.

    It acts nowhere in a sample without an invocation: its tokens are computed by the base.

    Args:
      tokens: `[B, T]`.
      invocation: `[K]`.
      segment_ids: `[B, T]`, of the samples of a row; None: each row is one sample.
    """
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    count = tokens.shape[1]
    width = len(invocation)
    ends = ((0, 0), (0, width - 1))
    # -1 is the id of no token and of no sample.
    padded = jnp.pad(tokens, ends, constant_values=-1)
    samples = jnp.pad(segment_ids, ends, constant_values=-1)
    matches = samples[:, width - 1 :] == segment_ids  # it ends in the sample where it starts
    for k in range(width):
        matches &= padded[:, k : k + count] == invocation[k]
    places = jnp.arange(count)
    starts = jnp.where(matches, places, -1)

    def last_of_sample(starts: Array, sample: Array) -> Array:
        return jax.ops.segment_max(starts, sample, num_segments=count + 1)[sample]

    last = jax.vmap(last_of_sample)(starts, segment_ids)
    return (last >= 0) & (places >= last)


def with_rows(params: Tree, rows: Array) -> Tree:
    """The parameters with the rows `[B, T]` in which LoRA is active beside every A and B.

    Raises:
      ValueError: as `check_activated`.
    """
    check_activated(params)
    layers = modules(params)
    for path, layer in layers.items():
        if low_rank.A in layer:
            stack = layer[low_rank.SCALE].shape
            layers[path] = layer | {ROWS: jnp.broadcast_to(rows, (*stack, *rows.shape))}
    return from_modules(layers)


def check_activated(params: Tree) -> None:
    """Raise where an adapter of a tree with an invocation would act before it too.

    Raises:
      ValueError: with the module's path and the reason.
    """
    for path, layer in modules(params).items():
        reason = None
        if magnitude.MAGNITUDE in layer:
            reason = "has a DoRA magnitude"
        elif kept_start.A0 in layer:
            reason = "has an init that changes the base"
        elif low_rank.A in layer and layer[low_rank.A].ndim != 3:  # [L, I, R]
            reason = "is no dense layer of a stack of layers"
        if reason is not None:
            raise ValueError(
                f"{path} {reason}, and an activated LoRA (adapter.invocation) changes nothing "
                "before its invocation: use plain LoRA on linear layers, with another adapter.init "
                "or adapter.exclude"
            )


__all__ = [
    "INVOCATION",
    "active_rows",
    "check_activated",
    "with_invocation",
    "with_rows",
]
