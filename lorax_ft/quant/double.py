"""Double quantization: the absmax values of NF4 in 8 bits (QLoRA, 2305.14314, section 3).

absmax = values[code] · scale[block of 256] + offset
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 256


def dynamic_values() -> np.ndarray:
    """The 256 values in [−1, 1] of a signed 8-bit "dynamic" float, ascending, float32 (1511.04561).

    An exponent is said by the number of leading zeros, and the bits that are left cut its decade evenly.
    """
    positive: list[float] = []
    for exponent in range(7):
        n = 2**exponent
        step = float(
            (np.float32(1) - np.float32(0.1)) / np.float32(n)
        )  # counted from both ends, as torch.linspace
        low, high = (
            float(np.float32(0.1)) + step * np.arange(n + 1),
            1 - step * np.arange(n + 1)[::-1],
        )
        edges = np.where(np.arange(n + 1) < (n + 1) // 2, low, high).astype(np.float32)
        positive += list(np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2))
    return np.array(sorted([*positive, *(-v for v in positive), 0, 1]), np.float32)


VALUES = dynamic_values()
MIDPOINTS = ((VALUES[1:].astype(np.float64) + VALUES[:-1]) / 2).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleQuantized:
    """Absmax values `[*L, R, C]` in 8 bits; each matrix of the stack has blocks and an offset of its own."""

    codes: Array
    """`[*L, R, C]` uint8."""
    scale: Array
    """`[*L, ⌈R C / 256⌉]` float32, the largest distance from the offset in a block."""
    offset: Array
    """`[*L]` float32, the mean."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the absmax values."""
        return self.codes.shape

    def dequantized(self) -> Array:
        """The absmax values `[*L, R, C]`, float32."""
        *stack, rows, columns = self.codes.shape
        scale = jnp.repeat(self.scale, BLOCK, axis=-1)[..., : rows * columns].reshape(
            *stack, rows, columns
        )
        return (
            jnp.take(jnp.asarray(VALUES), self.codes.astype(jnp.int32)) * scale
            + self.offset[..., None, None]
        )


def double(absmax: Array) -> DoubleQuantized:
    """Absmax values `[*L, R, C]` in 8 bits: to each the nearest of the dynamic values, times its block's scale."""
    *stack, rows, columns = absmax.shape
    offset = jnp.mean(absmax, axis=(-1, -2))
    flat = (absmax - offset[..., None, None]).reshape(*stack, rows * columns)
    blocks = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, -(rows * columns) % BLOCK)]).reshape(
        *stack, -1, BLOCK
    )
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    x = blocks / jnp.where(scale > 0, scale, 1)[..., None]
    codes = jnp.searchsorted(jnp.asarray(MIDPOINTS), x)
    codes = codes.astype(jnp.uint8).reshape(*stack, -1)[..., : rows * columns]
    return DoubleQuantized(codes=codes.reshape(absmax.shape), scale=scale, offset=offset)
