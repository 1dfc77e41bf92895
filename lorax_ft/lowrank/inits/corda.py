"""CorDA (2406.05223): the singular triples of W as the layer's inputs weigh it.

    C W = U S Vᵀ,   A = C⁻¹ U_r √(S_r / s),   B = √(S_r / s) V_rᵀ,   C = Σ xᵀ x / N

The base becomes W − s A B. The first r triples adapt to the inputs that C was measured on
(instruction-previewed mode, ipm); the last r preserve what such inputs need (knowledge-preserved
mode, kpm). C is scaled to a mean eigenvalue of 1, so that the factors depend neither on the number
of tokens nor on their size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import (
    Factors,
    HostFactors,
    map_matrices,
    on_host,
    root_split,
    smallest_first,
)

DAMP = 0.01  # of C's mean eigenvalue, added to the diagonal, as in the authors' code


def corda(context: InitContext) -> InitResult:
    """A and B from the first or the last singular triples of C W."""
    w = context.weight
    c = context.measured
    if context.svd_iterations is None:
        last = context.options["corda_mode"] == "kpm"
        factors = exact_factors(w, c, rank=context.rank, last=last)
    else:
        factors = randomized_factors(context, w, c)
    factors = context.divided_by_scale(factors)
    return InitResult(factors, removed=factors)


def randomized_factors(context: InitContext, w: Array, c: Array) -> Factors:
    """A √s and B √s by a randomized SVD on the device, which finds the first triples only."""
    c = damped(c)
    a, b = context.svd(highest_matmul(c, w.astype(jnp.float32)))
    with jax.default_matmul_precision("highest"):
        unweighted = jnp.linalg.solve(c, a)  # C⁻¹ A
    return unweighted, b


@jax.jit
def damped(c: Array) -> Array:
    """C `[L, I, I]` with a mean eigenvalue of 1, and `DAMP` on its diagonal."""
    n = c.shape[-1]
    trace = jnp.trace(c, axis1=1, axis2=2)[:, None, None]
    return c * (n / trace) + DAMP * jnp.eye(n)


def exact_factors(
    w: Array,
    c: Array,
    *,
    rank: int,
    last: bool,
) -> Factors:
    """A √s `[L, I, r]` and B √s `[L, r, O]`, on the host in float64.

    Args:
      w: `[L, I, O]`.
      c: `[L, I, I]`.
      rank: r.
      last: whether to use the last r triples, the very last first, in place of the first r.
    """

    def factors(w: np.ndarray, c: np.ndarray) -> HostFactors:
        w = w.astype(np.float64)
        c = c.astype(np.float64)
        # In place, since C may be larger than W.
        n = len(c)
        c *= n / np.trace(c)
        c[np.diag_indices(n)] += DAMP
        u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
        if last:
            u, s, vt = smallest_first(u, s, vt)
        unweighted = np.linalg.solve(c, u[:, :rank])  # C⁻¹ U_r
        return root_split(unweighted, s[:rank], vt[:rank])

    a, b = map_matrices(factors, on_host(w), on_host(c))
    a = a.astype(np.float32)
    b = b.astype(np.float32)
    return jnp.asarray(a), jnp.asarray(b)
