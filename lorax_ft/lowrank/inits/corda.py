"""CorDA: the singular triples of W as the layer's inputs weigh it; the base becomes W − s A B (2406.05223).

    C W = U S Vᵀ,   A = C⁻¹ U_r √(S_r / s),   B = √(S_r / s) V_rᵀ,   C = Σ xᵀ x / N

The first r triples adapt to the inputs that C was measured on (instruction-previewed mode, ipm); the
last r preserve what such inputs need (knowledge-preserved mode, kpm). C is scaled to a mean
eigenvalue of 1, so that the factors do not depend on the number of tokens, nor on their size.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import Factors, on_host, root_split

DAMP = 0.01  # of C's mean eigenvalue, added to the diagonal, as in the authors' code


def corda(context: InitContext) -> InitResult:
    """A and B from the first or the last singular triples of C W."""
    w, c = context.weight, context.measured
    if context.svd_iterations is None:
        last = context.options["corda_mode"] == "kpm"
        factors = exact_factors(w, c, rank=context.rank, last=last)
    else:
        factors = randomized_factors(context, w, c)
    factors = context.divided_by_scale(factors)
    return InitResult(factors, removed=factors)


def randomized_factors(context: InitContext, w: Array, c: Array) -> Factors:
    """A √s and B √s by a randomized SVD on the device, which finds the first triples only."""
    with jax.default_matmul_precision("highest"):
        c = jax.vmap(functools.partial(damped, jnp))(c)
        a, b = context.svd(jnp.matmul(c, w.astype(jnp.float32)))
        return jnp.linalg.solve(c, a), b


def exact_factors(w: Array, c: Array, *, rank: int, last: bool) -> Factors:
    """A √s `[L, I, r]` and B √s `[L, r, O]`, on the host in float64.

    Args:
      w: `[L, I, O]`.
      c: `[L, I, I]`.
      rank: r.
      last: whether to use the last r triples, the very last first, in place of the first r.
    """

    def factors(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        w, c = pair[0].astype(np.float64), damped(np, pair[1].astype(np.float64))
        u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
        if last:
            u, s, vt = u[:, ::-1], s[::-1], vt[::-1]
        unweighted = np.linalg.solve(c, u[:, :rank])  # C⁻¹ U_r
        return root_split(unweighted, s[:rank], vt[:rank])

    # One BLAS thread a matrix, for the reason that `svd.exact` gives.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(factors, zip(on_host(w), on_host(c), strict=True)))
    a = np.stack([a for a, _ in pairs]).astype(np.float32)
    b = np.stack([b for _, b in pairs]).astype(np.float32)
    return jnp.asarray(a), jnp.asarray(b)


def damped(xp: Any, c: Any) -> Any:
    """C with a mean eigenvalue of 1, and `DAMP` on its diagonal. `xp` is numpy or jax.numpy."""
    n = len(c)
    return c * (n / xp.trace(c)) + DAMP * xp.eye(n)
