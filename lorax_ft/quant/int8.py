"""int8: 8 bits a parameter, an absmax for each output channel (LLM.int8(), 2208.07339, section 2).

W[i, o] = code[i, o] · absmax[o] / 127

Letters: L stack axes, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.mesh_axes import MeshAxis
from lorax_ft.tree import Shape

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """A kernel `[*L, *ins, *outs]` in int8."""

    # [*L, *ins, *outs] int8
    codes: Array
    # [*L, *1s, *outs] float32, with a size of 1 for each in axis
    absmax: Array
    # The dtype of the kernel before quantization, and the default one after dequantization.
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The kernel's shape."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return self.codes.ndim

    def matrices(self, stack: int, rows: int) -> Int8:
        """The same kernel as `[L, I, O]`."""
        codes = self.codes.reshape(stack, rows, -1)
        absmax = self.absmax.reshape(stack, 1, -1)
        return dataclasses.replace(self, codes=codes, absmax=absmax)

    def dequantized(self, dtype: Any = None) -> Array:
        """The kernel as an array of `dtype`, by default of its own dtype."""
        step = self.absmax / LARGEST
        w = self.codes.astype(jnp.float32) * step
        return w.astype(dtype or self.dtype)

    def axes(
        self,
        kernel: tuple[MeshAxis, ...],
        sizes: Mapping[str, int],
    ) -> Int8:
        """The mesh axes of each part, from those of the kernel's axes.

        Args:
          kernel: the mesh axes of each of the kernel's axes.
          sizes: the size of each mesh axis.
        """
        # absmax has a size of 1 for an in axis, over which `sharding.fitted` does not split it.
        return dataclasses.replace(self, codes=kernel, absmax=kernel)  # type: ignore[arg-type]


def quantize(w: Array, *, n_stack: int, n_in: int) -> Int8:
    """Quantizes the kernel `[*L, *ins, *outs]` to int8, rounded to nearest (ties to even).

    Args:
      w: the kernel, in any float dtype; the arithmetic is in float32.
      n_stack: the number of stack axes.
      n_in: the number of in axes, which follow them.
    """
    full = w.astype(jnp.float32)
    in_axes = tuple(range(n_stack, n_stack + n_in))
    absmax = jnp.max(jnp.abs(full), axis=in_axes, keepdims=True)
    divisor = jnp.where(absmax > 0, absmax, 1)  # an output channel of zeros has the absmax 0
    codes = jnp.round(full * (LARGEST / divisor))
    codes = codes.astype(jnp.int8)
    return Int8(codes=codes, absmax=absmax, dtype=str(w.dtype))
