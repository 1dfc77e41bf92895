"""int8: a kernel in 8 bits a parameter and an absmax for each output channel (LLM.int8(), 2208.07339, section 2).

W[i, o] = code[i, o] · absmax[o] / 127
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """A kernel `[*L, *ins, *outs]` in int8."""

    codes: Array
    """`[*L, *ins, *outs]` int8."""
    absmax: Array
    """float32, with size 1 for each in axis."""
    dtype: str = dataclasses.field(metadata={"static": True})
    """The dtype that the kernel had, and has again once dequantized."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """How many axes the kernel has."""
        return self.codes.ndim

    def matrices(self, stack: int, rows: int) -> Int8:
        """The same as `[L, I, O]`."""
        codes, absmax = self.codes.reshape(stack, rows, -1), self.absmax.reshape(stack, 1, -1)
        return dataclasses.replace(self, codes=codes, absmax=absmax)

    def dequantized(self, dtype: Any = None) -> Array:
        """The kernel as an array of `dtype`, or of its own."""
        return (self.codes.astype(jnp.float32) * (self.absmax / LARGEST)).astype(
            dtype or self.dtype
        )

    def axes(self, kernel: tuple[str | None, ...], sizes: Mapping[str, int]) -> Int8:
        """For each part the mesh axis of each of its axes, where the kernel would lie as `kernel` says."""
        return dataclasses.replace(self, codes=kernel, absmax=kernel)  # type: ignore[arg-type]


def quantize(w: Array, *, n_stack: int, n_in: int) -> Int8:
    """The kernel `[*L, *ins, *outs]` in int8, rounded to the nearest (ties: to the even code).

    Args:
      w: the kernel, in any float type; quantized in float32.
      n_stack: how many axes L stands for.
      n_in: how many in axes follow.
    """
    full = w.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(full), axis=tuple(range(n_stack, n_stack + n_in)), keepdims=True)
    codes = jnp.round(full * (LARGEST / jnp.where(absmax > 0, absmax, 1))).astype(jnp.int8)
    return Int8(codes=codes, absmax=absmax, dtype=str(w.dtype))
