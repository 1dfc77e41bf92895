"""NF4: a kernel in 4 bits a parameter, and an absmax for each block of 64 (QLoRA, 2305.14314).

    W[o, i] = codebook[code[o, i]] · absmax[block of (o, i)]

Blocks run along the matrix flattened in PyTorch's order `[out, in]`; a byte holds two codes, the first in its high
half. Letters: L stack axes, I inputs, O outputs, N = I · O.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.quant.double import DoubleQuantized

BLOCK = 64
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [−1, 1], with an exact 0."""
MIDPOINTS = tuple(np.float32((low + high) / 2) for low, high in itertools.pairwise(CODEBOOK))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4:
    """A kernel `[*L, *ins, *outs]` in NF4."""

    codes: Array
    """`[*L, O, I / 2]` uint8; `[*L, 1, ⌈N / 2⌉]` where I is no multiple of 64, so that blocks run over rows."""
    absmax: Array | DoubleQuantized
    """`[*L, O, I / 64]` or `[*L, 1, ⌈N / 64⌉]`, float32, or quantized once more."""
    ins: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    """The dtype that the kernel had, and has again once dequantized."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return (*self.codes.shape[:-2], *self.ins, *self.outs)

    @property
    def ndim(self) -> int:
        """How many axes the kernel has."""
        return len(self.shape)

    def matrices(self, stack: int, rows: int) -> NF4:
        """The same as `[L, I, O]`."""
        n_stack = self.codes.ndim - 2
        flat = jax.tree.map(lambda part: part.reshape(stack, *part.shape[n_stack:]), self)
        return dataclasses.replace(flat, ins=(rows,), outs=(math.prod(self.outs),))

    def dequantized(self, dtype: Any = None) -> Array:
        """The kernel as an array of `dtype`, or of its own."""
        absmax = (
            self.absmax.dequantized() if isinstance(self.absmax, DoubleQuantized) else self.absmax
        )
        rows, bytes_ = self.codes.shape[-2:]
        shift = jnp.where(jnp.arange(2 * bytes_) % 2 == 0, 4, 0).astype(jnp.uint8)
        # Accelerators look up slowly; on a CPU choices bit by bit are not fused, and take 36 times the memory.
        codes = (jnp.repeat(self.codes, 2, axis=-1) >> shift) & 15
        values = jax.lax.platform_dependent(codes, cpu=_looked_up, default=_chosen)
        stack, (i, o) = self.codes.shape[:-2], (math.prod(self.ins), math.prod(self.outs))
        if i % BLOCK == 0:
            blocks = values.reshape(*stack, rows, -1, BLOCK) * absmax[..., None]
        else:
            blocks = values[..., : i * o] * jnp.repeat(absmax, BLOCK, axis=-1)[..., : i * o]
        w = blocks.astype(dtype or self.dtype).reshape(*stack, o, i)
        return w.swapaxes(-1, -2).reshape(self.shape)

    def axes(self, kernel: tuple[str | None, ...], sizes: Mapping[str, int]) -> NF4:
        """For each part the mesh axes of each of its axes, where the kernel would lie as `kernel` says.

        Rows and blocks are split. Where the blocks do not divide, rows are split over both mesh axes.
        """
        n = self.codes.ndim - 2
        stack, rows, blocks = kernel[:n], self.absmax.shape[-2], self.absmax.shape[-1]
        split: tuple[Any, ...] = (None, None)
        if rows > 1 and len(kernel) == n + 2:
            i, o = kernel[n:]
            split = (
                (o, i)
                if i and blocks % sizes[i] == 0
                else (tuple(a for a in (o, i) if a) or None, None)
            )

        def of(part: Array) -> Any:
            return (*stack, *split) if part.ndim == n + 2 else (*stack, *[None] * (part.ndim - n))

        return jax.tree.map(of, self)


def quantize(w: Array, *, n_stack: int, n_in: int) -> NF4:
    """The kernel `[*L, *ins, *outs]` in NF4: each block's absmax, each value's nearest code (ties: the lower).

    Args:
      w: the kernel, in any float type; quantized in float32.
      n_stack: how many axes L stands for.
      n_in: how many in axes follow.
    """
    ins, outs = w.shape[n_stack : n_stack + n_in], w.shape[n_stack + n_in :]
    stack, i, o = w.shape[:n_stack], math.prod(ins), math.prod(outs)
    flat = w.astype(jnp.float32).reshape(*stack, i, o).swapaxes(-1, -2)
    if i % BLOCK:  # one row of all values, filled up with zeros
        flat = flat.reshape(*stack, 1, i * o)
        flat = jnp.pad(flat, [(0, 0)] * (n_stack + 1) + [(0, -(i * o) % BLOCK)])
    blocks = flat.reshape(*flat.shape[:-1], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    codes = _encode(blocks / jnp.where(absmax > 0, absmax, 1)[..., None])
    codes = codes.reshape(*flat.shape[:-1], -1, 2)
    packed = ((codes[..., 0] << 4) | codes[..., 1])[..., : -(-i * o // 2) if i % BLOCK else None]
    return NF4(codes=packed, absmax=absmax, ins=ins, outs=outs, dtype=str(w.dtype))


def _encode(x: Array) -> Array:
    """The code of the nearest value of the codebook, for x in [−1, 1]: the number of midpoints below x."""
    return sum(
        ((x > middle).astype(jnp.uint8) for middle in MIDPOINTS), jnp.zeros(x.shape, jnp.uint8)
    )


def _looked_up(codes: Array) -> Array:
    """The codebook's values."""
    return jnp.take(jnp.asarray(CODEBOOK, jnp.float32), codes.astype(jnp.int32), mode="clip")


def _chosen(codes: Array) -> Array:
    """The codebook's values, chosen bit by bit."""
    values: list[Any] = [jnp.float32(value) for value in CODEBOOK]
    for bit in range(4):
        one = (codes >> bit) & 1 != 0
        values = [
            jnp.where(one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]
