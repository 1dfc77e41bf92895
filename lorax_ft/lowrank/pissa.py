"""PiSSA: A and B start from the top singular triples of W, and the base becomes W − s A B (2404.02948).

    W ≈ U_r S_r V_rᵀ,   A = U_r √(S_r / s),   B = √(S_r / s) V_rᵀ

On a quantized base it becomes q(W − s A B), and more rounds fit A and B to what quantizing then loses (QPiSSA):

    A B ← SVD_r(W − q(W − A B))
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from lorax_ft.lowrank.svd import Factors, product


def pissa(
    w: Array,
    *,
    svd: Callable[[Array], Factors],
    rounded: Callable[[Array], Array] | None,
    rounds: int,
) -> Factors:
    """A √s and B √s of a stack of matrices.

    Args:
      w: `[L, I, O]`.
      svd: gives U_r √S_r `[L, I, r]` and √S_r V_rᵀ `[L, r, O]` of such a stack.
      rounded: q, quantizing and back, or None where the base stays whole.
      rounds: SVDs in all; more than one only with q.
    """
    a, b = svd(w)
    if rounded is not None:
        for _ in range(rounds - 1):
            a, b = svd(w - rounded(w - product(a, b)))
    return a, b
