"""Double quantization: the absmax values of NF4 in 8 bits (QLoRA, 2305.14314, section 3).

absmax = values[code] · scale[block of 256] + offset

Letters: L stack axes, R rows and C columns of a matrix of absmax values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.tree import Shape

BLOCK = 256


def dynamic_values() -> np.ndarray:
    """The 256 values in [−1, 1] of a signed 8-bit "dynamic" float (1511.04561), ascending, float32.

    The number of leading zeros encodes a power of ten. The remaining bits divide that decade into
    equal intervals, and each code stands for the middle of an interval.
    """
    positive: list[float] = []
    # A byte has a sign, up to 6 leading zeros, a 1 that ends them, and the bits of the interval.
    for exponent in range(7):
        edges = _decade_edges(2**exponent)
        middles = _midpoints(edges)
        power_of_ten = np.float32(10.0 ** (exponent - 6))
        positive += list(power_of_ten * middles)
    negative = [-value for value in positive]
    # Two codes are left over; bitsandbytes gives them to 0 and 1.
    values = sorted([*negative, *positive, 0, 1])
    return np.array(values, np.float32)


def _decade_edges(intervals: int) -> np.ndarray:
    """`torch.linspace(0.1, 1, intervals + 1)`, to the last bit."""
    start = np.float32(0.1)
    length = np.float32(1) - start
    step = float(length / np.float32(intervals))
    index = np.arange(intervals + 1)
    # torch counts the first half up from the start, and the second half down from the end.
    from_start = float(start) + step * index
    from_end = 1 - step * index[::-1]
    is_first_half = index < (intervals + 1) // 2
    edges = np.where(is_first_half, from_start, from_end)
    return edges.astype(np.float32)


def _midpoints(values: np.ndarray) -> np.ndarray:
    """The middle between each value and the next."""
    low = values[:-1]
    high = values[1:]
    return (low + high) / 2


VALUES = dynamic_values()
# The borders between the values to which double() rounds.
MIDPOINTS = _midpoints(VALUES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleQuantized:
    """Absmax values `[*L, R, C]` in 8 bits. Each matrix of the stack has its own blocks."""

    # [*L, R, C] uint8
    codes: Array
    # [*L, ⌈R C / 256⌉] float32: the largest distance from the offset in each block
    scale: Array
    # [*L] float32: the mean
    offset: Array

    @property
    def shape(self) -> Shape:
        """The shape of the absmax values."""
        return self.codes.shape

    def dequantized(self) -> Array:
        """The absmax values `[*L, R, C]`, float32."""
        *stack, rows, columns = self.codes.shape
        scale = jnp.repeat(self.scale, BLOCK, axis=-1)
        # The last block may reach past the end of the matrix.
        scale = scale[..., : rows * columns]
        scale = scale.reshape(*stack, rows, columns)
        codes = self.codes.astype(jnp.int32)
        dynamic = jnp.asarray(VALUES)
        values = jnp.take(dynamic, codes)
        offset = self.offset[..., None, None]
        return values * scale + offset


def double(absmax: Array) -> DoubleQuantized:
    """Quantizes absmax values `[*L, R, C]` to 8 bits, rounded to the nearest dynamic value."""
    *stack, rows, columns = absmax.shape
    size = rows * columns
    offset = jnp.mean(absmax, axis=(-1, -2))
    centered = absmax - offset[..., None, None]

    # The blocks run over the ends of rows, and the last one is filled up with zeros.
    flat = centered.reshape(*stack, size)
    no_padding = [(0, 0)] * len(stack)
    to_whole_blocks = (0, -size % BLOCK)
    padded = jnp.pad(flat, [*no_padding, to_whole_blocks])
    blocks = padded.reshape(*stack, -1, BLOCK)

    scale = jnp.max(jnp.abs(blocks), axis=-1)
    divisor = jnp.where(scale > 0, scale, 1)  # a block of zeros has the scale 0
    normalized = blocks / divisor[..., None]
    midpoints = jnp.asarray(MIDPOINTS)
    codes = jnp.searchsorted(midpoints, normalized)
    codes = codes.astype(jnp.uint8)

    codes = codes.reshape(*stack, -1)
    codes = codes[..., :size]
    codes = codes.reshape(absmax.shape)
    return DoubleQuantized(codes=codes, scale=scale, offset=offset)
