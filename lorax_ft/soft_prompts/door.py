"""The doors of a model, at which virtual tokens get trained arrays in the place of its own.

Shapes: B batch, T tokens, V virtual tokens.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.tree import Layer, Tree, modules

PROMPT = "prompt_embedding"
KEY, VALUE = "prefix_key", "prefix_value"
ENCODER_INPUT = "encoder_input"
FILLINGS = ((PROMPT,), (KEY, VALUE))
"""The leaves of a door, one for each array that passes it."""


class VirtualTokens(nn.Module):
    """A door: it changes nothing, unless `adapt` sees leaves for it in the parameters."""

    def __call__(self, numbers: Array, *arrays: Array) -> tuple[Array, ...]:
        """The same arrays `[B, T, ...]`.

        Args:
          numbers: `[B, T]`, of the virtual tokens from 0; below 0 at all other tokens.
          *arrays: what the model has computed of the tokens.
        """
        return arrays


def pass_door(layer: Layer, numbers: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays `[B, T, ...]` with the leaves `[V, ...]` of a door at its virtual tokens."""
    for names in FILLINGS:
        if names[0] in layer:
            leaves = [layer[name] for name in names]
            pairs = zip(leaves, arrays, strict=True)
            return tuple(_filled(leaf, numbers, x) for leaf, x in pairs)
    return arrays


def _filled(leaf: Array, numbers: Array, x: Array) -> Array:
    is_virtual = numbers >= 0
    rows = leaf.astype(x.dtype)[jnp.maximum(numbers, 0)]  # [B, T, ...]
    ndim_more = x.ndim - numbers.ndim
    return jnp.where(is_virtual.reshape(*numbers.shape, *[1] * ndim_more), rows, x)


def virtual_tokens(params: Tree) -> int:
    """V: how many virtual tokens the soft prompt in the parameters has; 0 without one."""
    for layer in modules(params).values():
        for name, axis in ((PROMPT, 0), (ENCODER_INPUT, 0), (KEY, -3)):
            if name in layer:
                size: int = layer[name].shape[axis]
                return size
    return 0


def virtual_ids(count: int, *, vocab_size: int) -> np.ndarray:
    """The ids of so many virtual tokens, int32; they follow those of the vocabulary."""
    return np.arange(vocab_size, vocab_size + count, dtype=np.int32)
