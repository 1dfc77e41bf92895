"""What a decoder keeps of the tokens so far: keys and values, or the state of linear attention.

Shapes: B batch, S slots, L layers, P layers of a period.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft.models.attention import empty_keys_and_values
from lorax_ft.models.config import DecoderConfig, LayerType
from lorax_ft.models.linear_attention import empty_state
from lorax_ft.tree import flatten, member, unflatten

Cache = dict[str, Any]
"""A layer's arrays, stacked over layers; where their kinds alternate, by place in the period."""


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """A cache without content: arrays of zeros, `[L, B, ...]`.

    Where P kinds of layers alternate, it is a dict of P such trees, each `[L / P, B, ...]`.
    """
    period = config.period
    layers = []
    for layer_type in config.each_layer[:period]:
        layer = _empty_layer(config, layer_type, batch, slots)
        layers.append(_repeated(layer, config.layers // period))
    if period == 1:
        return layers[0]
    return {member(place, period): layer for place, layer in enumerate(layers)}


def with_slots(cache: Cache, count: int) -> Cache:
    """The cache with so many more slots for keys and values."""
    leaves = {}
    for path, leaf in flatten(cache).items():
        if _has_slots(path):
            widths = [(0, 0)] * leaf.ndim
            widths[3] = (0, count)
            leaf = jnp.pad(leaf, widths)
        leaves[path] = leaf
    return unflatten(leaves)


def slots_of(cache: Cache) -> int | None:
    """The slots for keys and values; None if no layer has any."""
    for path, leaf in flatten(cache).items():
        if _has_slots(path):
            return leaf.shape[3]
    return None


def _has_slots(path: str) -> bool:
    """Whether a leaf of a cache holds keys or values, `[L, B, K, S, C]`."""
    return path.rpartition("/")[2] in ("k", "v")


def _empty_layer(config: DecoderConfig, layer_type: LayerType, batch: int, slots: int) -> Cache:
    """The cache of one layer."""
    if layer_type.linear:
        return empty_state(config, layer_type.linear, batch)
    return empty_keys_and_values(config, config.heads_of(layer_type), batch, slots)


def _repeated(layer: Cache, count: int) -> Cache:
    """The same for so many layers."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), layer)
