"""EVA: A spans the directions in which a layer's inputs vary most, and B = 0 (2410.07170).

    C = Σ (x − x̄)ᵀ (x − x̄) / N = V Λ Vᵀ,   A = V_r,   B = 0

Then the ranks go to where directions explain most: the λ_i / Σ λ of all matrices are put in order, and the first of
them are taken, as many as there were ranks and at most ρ r of a matrix. The inputs are centered as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.svd import Factors

NOISE = 1e-7  # of the variance: what float32 cannot tell from none


def eva(c: Array, *, svd: Callable[[Array], Factors]) -> tuple[Array, Array]:
    """V_r `[L, I, r]` of a stack of covariances, and λ_i / Σ λ `[L, r]`.

    Args:
      c: `[L, I, I]`.
      svd: gives V_r √Λ_r `[L, I, r]` of such a stack, and its transpose.
    """
    v, _ = svd(c)
    roots = jnp.linalg.norm(v, axis=1)  # √λ
    variance = jnp.trace(c, axis1=1, axis2=2)[:, None]
    return v / jnp.where(roots > 0, roots, 1)[:, None], roots**2 / jnp.where(
        variance > 0, variance, 1
    )


def redistributed(
    ranks: Mapping[str, np.ndarray], explained: Mapping[str, np.ndarray], *, rho: float
) -> dict[str, np.ndarray]:
    """The ranks of all matrices by what their directions explain: as many in all, at most ρ r of a matrix.

    The first direction of every matrix stays, so that none is left without factors that train.

    Args:
      ranks: by module, r of the matrices of its stack `[L]`.
      explained: λ_i / Σ λ in falling order, `[L, R]`.
      rho: ρ.

    Raises:
      ValueError: there are fewer directions with any variance than ranks.
    """
    allowed = {
        path: np.arange(explained[path].shape[1]) < np.round(rho * r)[:, None]
        for path, r in ranks.items()
    }
    usable = {path: np.where(allowed[path], explained[path], 0.0) for path in ranks}
    for path, shares in usable.items():
        if not (shares[ranks[path] > 0, 0] > NOISE).all():
            raise ValueError(
                f"{path}: the calibration tokens do not vary there; give more adapter.calibration_batches"
            )
        shares[ranks[path] > 0, 0] = np.inf
    budget = sum(int(r.sum()) for r in ranks.values())
    pooled = np.concatenate([shares.ravel() for shares in usable.values()])
    if (pooled > NOISE).sum() < budget:
        raise ValueError(
            f"the calibration tokens vary in {(pooled > NOISE).sum()} directions, fewer than the {budget} ranks to "
            "start; give more adapter.calibration_batches, or a smaller adapter.rank"
        )
    taken = np.zeros(len(pooled), bool)
    taken[np.argsort(-pooled, kind="stable")[:budget]] = True
    ends = np.cumsum([shares.size for shares in usable.values()])[:-1]
    parts = zip(usable.items(), np.split(taken, ends), strict=True)
    return {path: part.reshape(shares.shape).sum(1) for (path, shares), part in parts}
