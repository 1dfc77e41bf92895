"""PiSSA (2404.02948): A and B start from the top singular triples of W.

    W ≈ U_r S_r V_rᵀ,   A = U_r √(S_r / s),   B = √(S_r / s) V_rᵀ

The base becomes W − s A B, and a quantized one q(W − s A B). More rounds fit A and B to what
quantizing then loses (QPiSSA):

    Q ← q(W − A B),   A B ← SVD_r(W − Q)

The paper ends its rounds on quantizing. Here they end on the decomposition, so that A and B are the
best for the base Q that they are trained on.
"""

from __future__ import annotations

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext, InitResult


def pissa(context: InitContext) -> InitResult:
    """A and B from the largest singular values of W."""
    w = context.weight
    removed = context.truncated_svd(w)
    latest = removed
    if context.quantize is not None and context.rounds > 1:
        for _ in range(context.rounds):
            removed = latest
            quantized = context.quantize(w - highest_matmul(*removed))
            latest = context.truncated_svd(w - quantized)
    factors = context.divided_by_scale(latest)
    return InitResult(factors, removed=context.divided_by_scale(removed))
