"""CorDA: the singular triples of W as the layer's inputs weigh it, and the base becomes W − s A B (2406.05223).

    C W = U S Vᵀ,   A = C⁻¹ U_r √(S_r / s),   B = √(S_r / s) V_rᵀ,   C = Σ xᵀ x / N

The first r preview the instructions whose inputs C is of (IPM); the last r leave what such inputs need (KPM). C is
scaled to a mean eigenvalue of 1, so that factors do not depend on how many tokens there were, nor on their size.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from threadpoolctl import threadpool_limits

from lorax_ft.lowrank.svd import Factors, on_host

DAMP = 0.01  # of C's mean eigenvalue, added to all, as in the authors' code


def corda(w: Array, c: Array, *, rank: int, last: bool, exact: bool) -> Factors:
    """A √s and B √s of a stack of matrices.

    Args:
      w: `[L, I, O]`.
      c: `[L, I, I]`.
      rank: r.
      last: whether the last r triples are taken, the very last first, or the first r.
      exact: whether it is done on the host in float64, or on the device in float32.
    """
    if not exact:
        with jax.default_matmul_precision("highest"):
            return lax.map(lambda pair: _factors(jnp, pair[0], pair[1], rank, last), (w.astype(jnp.float32), c))
    pairs = [[np.asarray(m, np.float64) for m in pair] for pair in zip(on_host(w), on_host(c), strict=True)]
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:  # see `svd.exact`
        parts = list(pool.map(lambda pair: _factors(np, pair[0], pair[1], rank, last), pairs))
    a, b = (np.stack(part).astype(np.float32) for part in zip(*parts, strict=True))
    return jnp.asarray(a), jnp.asarray(b)


def _factors(xp: Any, w: Any, c: Any, rank: int, last: bool) -> tuple[Any, Any]:
    """A √s and B √s of one matrix, by NumPy or its namesake."""
    n = len(c)
    c = c * (n / xp.trace(c)) + DAMP * xp.eye(n)
    u, s, vt = xp.linalg.svd(c @ w, full_matrices=False)
    if last:
        u, s, vt = u[:, ::-1], s[::-1], vt[::-1]
    root = xp.sqrt(s[:rank])
    return xp.linalg.solve(c, u[:, :rank]) * root, root[:, None] * vt[:rank]
