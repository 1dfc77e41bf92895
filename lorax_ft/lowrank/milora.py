"""MiLoRA: A and B start from the last singular triples of W, and the base becomes W − s A B (2406.09044).

    W = U S Vᵀ,   A = U_m √(S_m / s),   B = √(S_m / s) V_mᵀ,   m the r smallest

What W does most stays in the frozen base, U_p S_p V_pᵀ; the adapter begins orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from lorax_ft.lowrank.svd import Factors


def milora(w: Array, *, svd: Callable[..., Factors]) -> Factors:
    """A √s and B √s of a stack of matrices.

    Args:
      w: `[L, I, O]`.
      svd: gives, with `last`, U_m √S_m `[L, I, r]` and √S_m V_mᵀ `[L, r, O]` of such a stack, the smallest first, so
        that the first columns are a smaller rank's.
    """
    return svd(w, last=True)
