"""LoftQ: the quantized base and A B are fitted to W in turn (2310.08659, algorithm 1).

Q_t = q(W − s A_{t−1} B_{t−1}),   A_t B_t = SVD_r(W − Q_t) / s,   A_0 B_0 = 0
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.svd import Factors, product


def loftq(
    w: Array,
    *,
    rank: int,
    svd: Callable[[Array], Factors],
    rounded: Callable[[Array], Array],
    rounds: int,
) -> tuple[Factors, Factors]:
    """The last A √s and B √s of a stack of matrices, and those before them, from which the base is Q = q(W − s A B).

    Args:
      w: `[L, I, O]`.
      rank: r.
      svd: gives U_r √S_r `[L, I, r]` and √S_r V_rᵀ `[L, r, O]` of such a stack.
      rounded: q, quantizing and back.
      rounds: T.
    """
    count, rows, columns = w.shape
    last = (jnp.zeros((count, rows, rank)), jnp.zeros((count, rank, columns)))
    for _ in range(rounds):
        before, last = last, svd(w - rounded(w - product(*last)))
    return last, before
