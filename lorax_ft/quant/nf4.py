"""NF4: a kernel in 4 bits a parameter, and an absmax for each block of 64 (QLoRA, 2305.14314).

    W[o, i] = codebook[code[o, i]] · absmax[block of (o, i)]

Blocks run along the matrix flattened in PyTorch's order `[out, in]`. A byte holds two codes, the
first in its high half. Letters: L stack axes, I inputs, O outputs, N = I · O.
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

from lorax_ft.mesh_axes import MeshAxis, axis_names, devices_along, in_auto_axes
from lorax_ft.quant.double import DoubleQuantized
from lorax_ft.tree import Shape

BLOCK = 64
# Quantiles of a normal distribution, scaled to [−1, 1], with an exact 0.
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
# Marks a field as part of the tree's structure, not a leaf (`jax.tree_util.register_dataclass`).
STATIC = {"static": True}
# The borders between the values to which quantize() rounds.
MIDPOINTS = tuple(np.float32((low + high) / 2) for low, high in itertools.pairwise(CODEBOOK))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4:
    """A kernel `[*L, *ins, *outs]` in NF4.

    Where 64 divides I, every row of `[O, I]` is a whole number of blocks. Where it does not, blocks
    run over the ends of rows, and the parts hold all N values of a matrix as one row.
    """

    # [*L, O, I / 2] uint8, or [*L, 1, ⌈N / 2⌉]
    codes: Array
    # [*L, O, I / 64] or [*L, 1, ⌈N / 64⌉], float32 or double quantized
    absmax: Array | DoubleQuantized
    # The sizes of the in axes and of the out axes.
    ins: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    outs: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    # The dtype of the kernel before quantization, and the default one after dequantization.
    dtype: str = dataclasses.field(metadata=STATIC)

    @property
    def shape(self) -> Shape:
        """The kernel's shape."""
        stack = self.codes.shape[:-2]
        return (*stack, *self.ins, *self.outs)

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.shape)

    def matrices(self, stack: int, rows: int) -> NF4:
        """The same kernel as `[L, I, O]`."""
        n_stack = self.codes.ndim - 2

        def merge_stack_axes(part: Array) -> Array:
            return part.reshape(stack, *part.shape[n_stack:])

        merged = jax.tree.map(merge_stack_axes, self)
        columns = math.prod(self.outs)
        return dataclasses.replace(merged, ins=(rows,), outs=(columns,))

    def dequantized(self, dtype: Any = None) -> Array:
        """The kernel as an array of `dtype`, by default of its own dtype."""
        kernel: Array = in_auto_axes(
            lambda leaf: leaf._dequantized(dtype), self, like=NF4._split_as_the_kernel
        )
        return kernel

    def _split_as_the_kernel(self) -> Array:
        """An array of as many axes that are split over devices, on a mesh of Explicit axes."""
        matrix = self.codes.swapaxes(-1, -2)  # [*L, I / 2, O]
        if self.codes.shape[-2] == 1:
            # The values of all rows are one row.
            matrix = matrix.sum(-2, keepdims=True)
        n_stack = self.codes.ndim - 2
        n_in = len(self.ins)
        further_ins = range(n_stack + 1, n_stack + n_in)
        further_outs = range(n_stack + n_in + 1, self.ndim)
        return jnp.expand_dims(matrix, (*further_ins, *further_outs))

    def _dequantized(self, dtype: Any) -> Array:
        absmax = self.absmax
        if isinstance(absmax, DoubleQuantized):
            absmax = absmax.dequantized()
        values = _decode(_unpack(self.codes))

        *stack, rows, _ = self.codes.shape
        i = math.prod(self.ins)
        o = math.prod(self.outs)
        if i % BLOCK == 0:
            blocks = values.reshape(*stack, rows, -1, BLOCK)
            w = blocks * absmax[..., None]
        else:
            # The last byte and the last block may reach past the end of the matrix.
            n = i * o
            values = values[..., :n]
            scale = jnp.repeat(absmax, BLOCK, axis=-1)
            w = values * scale[..., :n]
        w = w.astype(dtype or self.dtype)
        w = w.reshape(*stack, o, i)
        w = w.swapaxes(-1, -2)  # [*L, I, O]
        return w.reshape(self.shape)

    def axes(
        self,
        kernel: tuple[MeshAxis, ...],
        sizes: Mapping[str, int],
    ) -> NF4:
        """The mesh axes of each part, from those of the kernel's axes.

        Rows and blocks are split. Where blocks do not divide, rows are split over all of them.

        Args:
          kernel: the mesh axes of each of the kernel's axes.
          sizes: the size of each mesh axis.
        """
        n_stack = self.codes.ndim - 2
        stack_axes = kernel[:n_stack]
        matrix_axes = self._matrix_axes(kernel[n_stack:], sizes)

        def mesh_axes(part: Array) -> Any:
            if part.ndim == n_stack + 2:  # the codes, and absmax values or their codes
                return (*stack_axes, *matrix_axes)
            # Blocks of absmax values run over the ends of rows: scale and offset are not split.
            whole = [None] * (part.ndim - n_stack)
            return (*stack_axes, *whole)

        return jax.tree.map(mesh_axes, self)

    def _matrix_axes(
        self,
        kernel: tuple[MeshAxis, ...],
        sizes: Mapping[str, int],
    ) -> tuple[Any, Any]:
        """The mesh axes of a part's rows and of its blocks, from those of the in and out axes."""
        rows, blocks = self.absmax.shape[-2:]
        # A matrix stored as one row stays whole, and so does a kernel with several in or out axes.
        if rows <= 1 or len(kernel) != 2:
            return None, None
        i, o = kernel
        blocks_divide = i is not None and blocks % devices_along(i, sizes) == 0
        if blocks_divide:
            return o, i
        both = axis_names(o) + axis_names(i)
        return both or None, None


def quantize(w: Array, *, n_stack: int, n_in: int) -> NF4:
    """Quantizes the kernel `[*L, *ins, *outs]` to NF4: the nearest codes (ties to the lower code).

    Args:
      w: the kernel, in any float dtype; the arithmetic is in float32.
      n_stack: the number of stack axes.
      n_in: the number of in axes, which follow them.
    """
    stack = w.shape[:n_stack]
    ins = w.shape[n_stack : n_stack + n_in]
    outs = w.shape[n_stack + n_in :]
    i = math.prod(ins)
    o = math.prod(outs)
    n = i * o
    whole_blocks = i % BLOCK == 0

    full = w.astype(jnp.float32)
    rows = full.reshape(*stack, i, o)
    rows = rows.swapaxes(-1, -2)  # [*L, O, I]
    if not whole_blocks:
        rows = rows.reshape(*stack, 1, n)
        no_padding = [(0, 0)] * (n_stack + 1)
        to_whole_blocks = (0, -n % BLOCK)
        rows = jnp.pad(rows, [*no_padding, to_whole_blocks])
    row_axes = rows.shape[:-1]
    blocks = rows.reshape(*row_axes, -1, BLOCK)

    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    divisor = jnp.where(absmax > 0, absmax, 1)  # a block of zeros has the absmax 0
    normalized = blocks / divisor[..., None]
    codes = _encode(normalized)

    pairs = codes.reshape(*row_axes, -1, 2)
    high_half = pairs[..., 0] << 4
    low_half = pairs[..., 1]
    packed = high_half | low_half
    if not whole_blocks:
        # The padding is not stored, except for half a byte where N is odd.
        n_bytes = (n + 1) // 2
        packed = packed[..., :n_bytes]
    return NF4(
        codes=packed,
        absmax=absmax,
        ins=ins,
        outs=outs,
        dtype=str(w.dtype),
    )


def _encode(x: Array) -> Array:
    """The code of the nearest codebook value, for x in [−1, 1]: the number of midpoints below x."""
    codes = jnp.zeros(x.shape, jnp.uint8)
    for midpoint in MIDPOINTS:
        is_above = x > midpoint
        codes = codes + is_above.astype(jnp.uint8)
    return codes


def _unpack(packed: Array) -> Array:
    """The codes of packed bytes: `[..., n]` to `[..., 2 n]`."""
    n = packed.shape[-1]
    index = jnp.arange(2 * n)
    shift = jnp.where(index % 2 == 0, 4, 0)  # the high half first
    shift = shift.astype(jnp.uint8)
    twice = jnp.repeat(packed, 2, axis=-1)
    return (twice >> shift) & 15


def _decode(codes: Array) -> Array:
    """The codebook values of codes."""
    # Table lookups are slow on accelerators. On CPUs XLA does not fuse the selects, which then take
    # 36 times the memory of the lookup.
    return jax.lax.platform_dependent(codes, cpu=_decode_by_lookup, default=_decode_by_selects)


def _decode_by_lookup(codes: Array) -> Array:
    codebook = jnp.asarray(CODEBOOK, jnp.float32)
    indices = codes.astype(jnp.int32)
    return jnp.take(codebook, indices, mode="clip")


def _decode_by_selects(codes: Array) -> Array:
    """A tournament of four rounds: bit by bit, from the lowest, half of the values are left."""
    values: list[Any] = [jnp.float32(value) for value in CODEBOOK]
    for bit in range(4):
        is_set = (codes >> bit) & 1 != 0
        even = values[::2]
        odd = values[1::2]
        pairs = zip(even, odd, strict=True)
        values = [jnp.where(is_set, b, a) for a, b in pairs]
    return values[0]
