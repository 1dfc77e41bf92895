"""PiSSA (2404.02948): A and B start from the top singular triples of W.

    W ≈ U_r S_r V_rᵀ,   A = U_r √(S_r / s),   B = √(S_r / s) V_rᵀ

The base becomes W − s A B, and a quantized one q(W − s A B). More rounds fit A and B to what
quantizing then loses (QPiSSA):

    A B ← SVD_r(W − q(W − A B))
"""

from __future__ import annotations

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import product


def pissa(context: InitContext) -> InitResult:
    """A and B from the largest singular values of W."""
    w = context.weight
    a, b = context.truncated_svd(w)
    if context.quantize is not None:
        for _ in range(context.rounds - 1):
            quantized = context.quantize(w - product(a, b))
            a, b = context.truncated_svd(w - quantized)
    factors = context.divided_by_scale((a, b))
    return InitResult(factors, removed=factors)
