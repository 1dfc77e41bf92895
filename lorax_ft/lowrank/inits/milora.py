"""MiLoRA (2406.09044): A and B start from the last singular triples of W.

    W = U S Vᵀ,   A = U_m √(S_m / s),   B = √(S_m / s) V_mᵀ,   m the r smallest

The base becomes W − s A B. What matters most in W stays in the frozen base, and the adapter starts
orthogonal to it.
"""

from __future__ import annotations

from lorax_ft.lowrank.inits.context import InitContext, InitResult


def milora(context: InitContext) -> InitResult:
    """A and B from the smallest singular values of W.

    The very smallest comes first, so that the first columns are those of a smaller rank.
    """
    last_triples = context.truncated_svd(context.weight, last=True)
    factors = context.divided_by_scale(last_triples)
    return InitResult(factors, removed=factors)
