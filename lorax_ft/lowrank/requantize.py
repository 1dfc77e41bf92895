"""Requantizing a base without its adapters' start: each W is read again, as q(W − s A₀ B₀)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.svd import Factors
from lorax_ft.lowrank.terms import kept_start
from lorax_ft.quant.kernels import Quantized, dense, quantize_as
from lorax_ft.quant.stream import streamed
from lorax_ft.tree import Layer, Shape

Original = Callable[[tuple[int, ...]], np.ndarray]
"""Reads the matrix `[*ins, *outs]` at an index of the stack, as it was before it was quantized."""
Quantize = Callable[[Array], Array]
"""Quantizes and dequantizes again."""


def is_requantized(layer: Layer) -> bool:
    """Whether the layer's kernel is q(W − s A₀ B₀): W and q(W) cannot be computed from it again."""
    return isinstance(layer.get("kernel"), Quantized) and kept_start.is_in_base(layer)


def requantizer(kernel: Quantized) -> Quantize:
    """Quantizes matrices `[L, I, O]` as `kernel` is, and dequantizes them again."""

    def quantize(w: Array) -> Array:
        return dense(quantize_as(kernel, w, n_stack=1, n_in=1))

    return quantize


def read_matrix(original: Original, stack: Shape, i: int) -> Array:
    """The matrix at place `i` of a stack whose axes have the sizes `stack`, in float32."""
    index = tuple(int(place) for place in np.unravel_index(i, stack)) if stack else ()
    return jnp.asarray(original(index), jnp.float32)


def requantized(
    kernel: Quantized,
    original: Original,
    start: Factors,
    scales: np.ndarray,
    *,
    n_in: int,
) -> Quantized:
    """The stack q(W − s A₀ B₀), in the format of `kernel` and on its devices.

    Args:
      kernel: of the shape `[*L, *ins, *outs]`.
      original: reads W.
      start: A₀ `[L, I, R]` and B₀ `[L, R, O]`.
      scales: s, `[*L]`.
      n_in: how many in axes the kernel has.
    """
    stack = scales.shape
    sizes = kernel.shape[scales.ndim :]
    rows = math.prod(sizes[:n_in])
    a, b = start

    def matrix(index: tuple[int, ...]) -> Quantized:
        i = int(np.ravel_multi_index(index, stack)) if stack else 0
        w = read_matrix(original, stack, i).reshape(rows, -1)
        changed = w - scales[index] * highest_matmul(a[i], b[i])
        return quantize_as(kernel, changed.reshape(sizes), n_stack=0, n_in=n_in)

    shardings = jax.tree.map(lambda part: part.sharding, kernel)
    return streamed(matrix, stack=stack, like=kernel, on=shardings)
