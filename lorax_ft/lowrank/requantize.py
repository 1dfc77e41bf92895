"""Taking a start out of a base that is quantized: W is read again, a matrix at a time, and becomes q(W − s A₀ B₀)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.svd import Factors, product
from lorax_ft.quant.kernels import Quantized, dense, quantize_as
from lorax_ft.quant.stream import streamed

Original = Callable[[tuple[int, ...]], np.ndarray]
"""Reads the matrix `[*ins, *outs]` at an index of the stack, as it was before it was quantized."""
Rounded = Callable[[Array], Array]
"""Quantizing and back."""


def is_requantized(layer: Mapping[str, Any]) -> bool:
    """Whether the layer's kernel is q(W − s A₀ B₀), which neither W nor q(W) and the factors give back."""
    return (
        isinstance(layer.get("kernel"), Quantized)
        and "lora_a0" in layer
        and "start_scale" not in layer
    )


def requantized(
    kernel: Quantized,
    original: Original,
    start_of: Callable[[Array, slice, Rounded], Factors],
    scales: np.ndarray,
    *,
    n_in: int,
) -> Quantized:
    """The stack quantized anew, as `kernel` is and where it is, without its start.

    Args:
      kernel: of the shape `[*L, *ins, *outs]`.
      original: reads W.
      start_of: gives A₀ and B₀ `[1, ...]` of one W `[1, I, O]`, of its place in the stack, and of q.
      scales: s, `[*L]`.
      n_in: how many in axes the kernel has.
    """
    stack, sizes = scales.shape, kernel.shape[scales.ndim :]
    rows = math.prod(sizes[:n_in])

    def rounded(w: Array) -> Array:
        return dense(quantize_as(kernel, w, n_stack=1, n_in=1))

    def matrix(index: tuple[int, ...]) -> Quantized:
        i = int(np.ravel_multi_index(index, stack)) if stack else 0
        w = jnp.asarray(original(index), jnp.float32).reshape(1, rows, -1)
        a, b = start_of(w, slice(i, i + 1), rounded)
        return quantize_as(
            kernel, (w - scales[index] * product(a, b)).reshape(sizes), n_stack=0, n_in=n_in
        )

    return streamed(
        matrix, stack=stack, like=kernel, on=jax.tree.map(lambda part: part.sharding, kernel)
    )
