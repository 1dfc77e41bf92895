"""LoRA-GA: the first step of s A B goes where full fine-tuning's would; the base becomes W − s A B.

    ∂L/∂W = U S Vᵀ,   A = c U_[1 … r],   B = c V_[r+1 … 2r]ᵀ,   c = O^¼ / √γ      (2407.05000)

A and B have no direction in common, so that A dB + dA B, at equal rates, is the gradient's best
approximation of rank 2 r. S plays no part, so the gradient's size does not matter.
"""

from __future__ import annotations

import jax.numpy as jnp

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import nonzero


def lora_ga(context: InitContext) -> InitResult:
    """A from the first r singular vectors of the gradient, B from the next r."""
    gamma = context.options["lora_ga_gamma"]
    rank = context.rank
    _, _, columns = context.shape
    u, vt = context.svd(context.measured, rank=2 * rank)
    # The context's SVD multiplies each side by √S, which is divided out here.
    u_size = jnp.linalg.norm(u, axis=1, keepdims=True)
    u = u / nonzero(u_size)
    vt_size = jnp.linalg.norm(vt, axis=2, keepdims=True)
    vt = vt / nonzero(vt_size)
    # Rows r+1 … 2r, with each matrix's own r.
    own_ranks = jnp.asarray(context.ranks)[:, None]
    second = own_ranks + jnp.arange(rank)  # [L, R]
    c = columns**0.25 / gamma**0.5
    a = c * u[:, :, :rank]
    b = c * jnp.take_along_axis(vt, second[:, :, None], axis=1)
    return InitResult((a, b), removed=(a, b))
