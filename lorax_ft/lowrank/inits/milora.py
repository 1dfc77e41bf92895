"""MiLoRA: A and B start from the last singular triples of W; the base becomes W − s A B (2406.09044).

    W = U S Vᵀ,   A = U_m √(S_m / s),   B = √(S_m / s) V_mᵀ,   m the r smallest

What matters most in W stays in the frozen base, and the adapter starts orthogonal to it.
"""

from __future__ import annotations

from lorax_ft.lowrank.inits.context import InitContext, InitResult


def milora(context: InitContext) -> InitResult:
    """A and B from the smallest singular values of W.

    The very smallest comes first, so that the first columns are those of a smaller rank.
    """
    factors = context.divided_by_scale(context.truncated_svd(context.weight, last=True))
    return InitResult(factors, removed=factors)
