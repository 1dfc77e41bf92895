"""OLoRA: A and B start from a QR decomposition of W, and the base becomes W − s A B (2406.01775).

Wᵀ = Q R,   A = (first r rows of R)ᵀ,   B = (first r columns of Q)ᵀ
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(jax.jit, static_argnames="rank")
def olora(w: Array, *, rank: int) -> tuple[Array, Array]:
    """A `[L, I, r]` and B `[L, r, O]` of a stack of matrices `[L, I, O]`, float32.

    The first r columns of Q are the Q of Wᵀ's first r columns, so no more is decomposed; and then (QᵀWᵀ)ᵀ = W Q.
    """
    w = w.astype(jnp.float32)
    q, _ = jnp.linalg.qr(w[:, :rank].swapaxes(1, 2))  # [L, O, r]
    return jnp.matmul(w, q, precision=lax.Precision.HIGHEST), q.swapaxes(1, 2)
