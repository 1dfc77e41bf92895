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
    gamma, rank = context.options["lora_ga_gamma"], context.rank
    _, _, columns = context.shape
    u, vt = context.svd(context.measured, rank=2 * rank)
    u = u / nonzero(jnp.linalg.norm(u, axis=1, keepdims=True))
    vt = vt / nonzero(jnp.linalg.norm(vt, axis=2, keepdims=True))
    # Rows r+1 … 2r, with each matrix's own r.
    second = jnp.asarray(context.ranks)[:, None] + jnp.arange(rank)  # [L, R]
    c = columns**0.25 / gamma**0.5
    factors = c * u[:, :, :rank], c * jnp.take_along_axis(vt, second[:, :, None], axis=1)
    return InitResult(factors, removed=factors)
