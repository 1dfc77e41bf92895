"""OLoRA: A and B start from a QR decomposition of W, and the base becomes W − s A B (2406.01775).

Wᵀ = Q R,   A = (first r rows of R)ᵀ,   B = (first r columns of Q)ᵀ
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import Factors, factors_like
from lorax_ft.mesh_axes import in_auto_axes


def olora(context: InitContext) -> InitResult:
    """A and B from the first r columns of Q."""
    factors = qr_factors(context.weight, rank=context.rank)
    return InitResult(factors, removed=factors)


# Jitted, or each operation would hold a temporary of the stack's size.
@functools.partial(jax.jit, static_argnames="rank")
def qr_factors(w: Array, *, rank: int) -> Factors:
    """A `[L, I, r]` and B `[L, r, O]` of matrices `[L, I, O]`, float32.

    The first r columns of Q are the Q of Wᵀ's first r columns, so only these are decomposed. The
    first r rows of R are then Qᵀ Wᵀ, so that A = W Q.
    """
    factors: Factors = in_auto_axes(functools.partial(_qr_factors, rank=rank), w, like=factors_like)
    return factors


def _qr_factors(w: Array, *, rank: int) -> Factors:
    w = w.astype(jnp.float32)
    first_columns = w[:, :rank].swapaxes(1, 2)  # [L, O, r]
    q, _ = jnp.linalg.qr(first_columns)  # [L, O, r]
    a = highest_matmul(w, q)
    b = q.swapaxes(1, 2)
    return a, b
