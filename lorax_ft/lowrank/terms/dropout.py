"""Dropout on the input of an adapter's branch: x̃, in training steps only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.terms.term import Term
from lorax_ft.tree import Layer, Shape

KEY, RATE = "dropout_key", "dropout_rate"


def dropped(layer: Layer, x: Array) -> Array:
    """x̃: x with some elements zeroed and the others scaled up; x itself without dropout leaves.

    The same layer gives the same x̃ wherever it is asked for, since the key is a leaf.
    """
    if KEY not in layer:
        return x
    # The input of an embedding is token ids, which cannot be scaled.
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    # The experts of a stack share x, so they share the first one's key.
    key = layer[KEY].reshape(-1)[0]
    rate = layer[RATE].reshape(-1)[0]
    keep = 1 - rate  # in float32, as bfloat16 cannot represent 0.99
    scaled = x.astype(jnp.float32) / keep
    scaled = scaled.astype(x.dtype)
    is_kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(is_kept, scaled, 0)


def fold_in(layer: Layer, data: Array) -> Layer:
    """The layer with another dropout key, for another part of its input."""
    if KEY not in layer:
        return layer
    key = jax.random.fold_in(layer[KEY], data)
    return layer | {KEY: key}


def leaves(key: Array, rate: float, *, stack: Shape) -> Layer:
    """The dropout leaves of a layer: a key for each matrix of its stack."""
    if stack:
        key = jax.random.split(key, stack)
    rates = jnp.full(stack, rate, jnp.float32)
    return {KEY: key, RATE: rates}


TERM = Term(leaves=(KEY, RATE))
