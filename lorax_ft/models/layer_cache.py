"""A layer's part of the cache, whose arrays are those of all layers, `[L, B, ...]`.

The scan over layers carries the whole cache, so that a layer writes to it in place. As an input and
an output of each layer, all of it would be copied for each token.

Shapes: L layers, B batch, T tokens, S slots, K key/value heads, C channels of a head. A start that
several rows share is a cache of one row; it is read, never written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

Stacked = dict[str, Array]
"""`[L, B, ...]`, by name."""


def read(cache: Stacked, layer: Array) -> dict[str, Array]:
    """The arrays `[B, ...]` of a layer."""
    return {name: _own(stack, layer) for name, stack in cache.items()}


def written(cache: Stacked, own: dict[str, Array], layer: Array) -> Stacked:
    """The cache with these arrays `[B, ...]` of a layer."""
    if any(_is_shared(cache[name], x) for name, x in own.items()):
        return cache
    return {
        name: lax.dynamic_update_index_in_dim(cache[name], x, layer, axis=0)
        for name, x in own.items()
    }


def with_tokens(
    cache: Stacked,
    new: dict[str, Array],
    layer: Array,
    positions: Array,
) -> tuple[dict[str, Array], Stacked]:
    """The keys and values `[B, K, S, C]` of a layer, and the cache, both with those of new tokens.

    Args:
      cache: `[L, B, K, S, C]`: the order in which a product of one query takes them.
      new: `[B, T, K, C]`.
      layer: its number.
      positions: `[B, T]`, the slots of the tokens, which follow one another.
    """
    shared = any(_is_shared(cache[name], x) for name, x in new.items())
    if positions.shape[1] == 1 and not shared:
        cache = {name: _with_token(cache[name], x, layer, positions) for name, x in new.items()}
        return read(cache, layer), cache
    own = {}
    for name, x in new.items():
        own[name] = _with_rows(_own(cache[name], layer), x, positions[:, 0])
    return own, written(cache, own, layer)


def _own(stack: Array, layer: Array) -> Array:
    return lax.dynamic_index_in_dim(stack, layer, axis=0, keepdims=False)


def _is_shared(stack: Array, x: Array) -> bool:
    """Whether the rows of `x` share the one row of a cache."""
    return stack.shape[1] < len(x)


def _with_token(stack: Array, new: Array, layer: Array, positions: Array) -> Array:
    """The stack `[L, B, K, S, C]` with one token's `new` `[B, 1, K, C]`."""
    if jax.default_backend() == "cpu":
        # Half of the time of what is below. A TPU would copy the whole stack for it.
        rows = jnp.arange(new.shape[0])[:, None]
        heads = jnp.arange(new.shape[2])
        return stack.at[layer, rows, heads, positions].set(new[:, 0])
    own = _own(stack, layer)
    is_new = jnp.arange(own.shape[2]) == positions  # [B, S]
    own = jnp.where(is_new[:, None, :, None], new.swapaxes(1, 2), own)
    return lax.dynamic_update_index_in_dim(stack, own, layer, axis=0)


def _with_rows(own: Array, new: Array, starts: Array) -> Array:
    """The slots `[B or 1, K, S, C]` with `new` `[B, T, K, C]` from each row's start `[B]` on."""
    own = jnp.broadcast_to(own, (len(new), *own.shape[1:]))

    def write_row(slots: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(slots, part, start, axis=1)

    return jax.vmap(write_row)(own, new.swapaxes(1, 2), starts)
