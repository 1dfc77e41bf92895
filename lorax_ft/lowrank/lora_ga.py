"""LoRA-GA: the first step of s A B goes where full fine-tuning's would, and the base becomes W − s A B (2407.05000).

    ∂L/∂W = U S Vᵀ,   A = c U_[1 … r],   B = c V_[r+1 … 2r]ᵀ,   c = O^¼ / √γ

A and B have no direction in common, so that A dB + dA B, at rates alike, is the gradient's best of rank 2 r. S does
not enter, so that the gradient's size does not matter.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.svd import Factors


def lora_ga(
    g: Array, *, rank: int, ranks: np.ndarray, gamma: float, svd: Callable[[Array], Factors]
) -> Factors:
    """A `[L, I, r]` and B `[L, r, O]` of a stack of matrices.

    Args:
      g: ∂L/∂W `[L, I, O]`.
      rank: the largest r.
      ranks: each matrix's own, `[L]`.
      gamma: γ.
      svd: gives U √S `[L, I, 2 r]` and √S Vᵀ `[L, 2 r, O]` of such a stack.
    """
    u, vt = svd(g)
    u = u / _size(jnp.linalg.norm(u, axis=1, keepdims=True))
    vt = vt / _size(jnp.linalg.norm(vt, axis=2, keepdims=True))
    second = jnp.asarray(ranks)[:, None] + jnp.arange(rank)  # r+1 … 2r of each matrix
    c = g.shape[2] ** 0.25 / gamma**0.5
    return c * u[:, :, :rank], c * jnp.take_along_axis(vt, second[:, :, None], axis=1)


def _size(norm: Array) -> Array:
    return jnp.where(norm > 0, norm, 1)
