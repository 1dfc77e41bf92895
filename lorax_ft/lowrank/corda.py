"""CorDA: the singular triples of W as the layer's inputs weigh it, and the base becomes W − s A B (2406.05223).

    C W = U S Vᵀ,   A = C⁻¹ U_r √(S_r / s),   B = √(S_r / s) V_rᵀ,   C = Σ xᵀ x / N

The first r preview the instructions whose inputs C is of (IPM); the last r leave what such inputs need (KPM). C is
scaled to a mean eigenvalue of 1, so that factors do not depend on how many tokens there were, nor on their size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from lorax_ft.lowrank.svd import Factors, on_host

DAMP = 0.01  # of C's mean eigenvalue, added to all, as in the authors' code


def corda(
    w: Array, c: Array, *, rank: int, last: bool, randomized: Callable[[Array], Factors] | None
) -> Factors:
    """A √s and B √s of a stack of matrices.

    Args:
      w: `[L, I, O]`.
      c: `[L, I, I]`.
      rank: r.
      last: whether the last r triples are taken, the very last first, or the first r.
      randomized: gives U_r √S_r and √S_r V_rᵀ of such a stack as W on the device; None: all is done on the host, in
        float64.
    """
    if randomized is not None:
        with jax.default_matmul_precision("highest"):
            c = jax.vmap(functools.partial(_damped, jnp))(c)
            a, b = randomized(jnp.matmul(c, w.astype(jnp.float32)))
            return jnp.linalg.solve(c, a), b

    def factors(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        w, c = pair[0].astype(np.float64), _damped(np, pair[1].astype(np.float64))
        u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
        if last:
            u, s, vt = u[:, ::-1], s[::-1], vt[::-1]
        root = np.sqrt(s[:rank])
        return np.linalg.solve(c, u[:, :rank]) * root, root[:, None] * vt[:rank]

    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):  # see `svd.exact`
        parts = list(pool.map(factors, zip(on_host(w), on_host(c), strict=True)))
    a, b = (jnp.asarray(np.stack(part).astype(np.float32)) for part in zip(*parts, strict=True))
    return a, b


def _damped(xp: Any, c: Any) -> Any:
    """C with a mean eigenvalue of 1, and `DAMP` on its diagonal; by NumPy or its namesake."""
    n = len(c)
    return c * (n / xp.trace(c)) + DAMP * xp.eye(n)
