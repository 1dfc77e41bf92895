"""EVA: A spans the directions in which a layer's inputs vary most, and B = 0 (2410.07170).

    C = Σ (x − x̄)ᵀ (x − x̄) / N = V Λ Vᵀ,   A = V_r,   B = 0

The ranks then go where directions explain most of the variance: the λ_i / Σ λ of all matrices are
sorted, and the first of them are chosen, as many as there were ranks, with at most ρ r for a matrix.
The inputs are centered, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import Factors, nonzero, svd
from lorax_ft.lowrank.keys import fold_path
from lorax_ft.lowrank.plan import Plan

NOISE = 1e-7  # of the variance: what float32 cannot tell from zero


def eva(context: InitContext) -> InitResult:
    """A from the directions that `redistribute` put in the place of the covariance; B = 0."""
    return InitResult((context.measured, context.zeros_b()))


def redistribute(
    plans: Mapping[str, Plan], covariances: Mapping[str, Array], config: Any, *, key: Array
) -> tuple[dict[str, Plan], dict[str, Array]]:
    """The plans with ranks where they explain most, and the directions `[L, I, R]` for A.

    Alpha follows a matrix's rank, as in PEFT, so that alpha / r stays.

    Args:
      plans: by module path, with room for ρ r directions.
      covariances: by module path, `[L, I, I]`.
      config: the AdapterConfig.
      key: for the randomized SVD.
    """
    directions: dict[str, Array] = {}
    explained: dict[str, np.ndarray] = {}
    for path, c in covariances.items():
        keys = jax.random.split(fold_path(key, path), len(c))
        pair = svd(c, rank=plans[path].width, iterations=config.svd_iterations, keys=keys)
        directions[path], share = principal_directions(c, pair)
        explained[path] = np.asarray(share)
    if config.eva_rho == 1 or not explained:
        return dict(plans), directions
    ranks = {path: plans[path].ranks.reshape(-1) for path in explained}
    new_ranks = redistributed(ranks, explained, rho=config.eva_rho)
    changed = dict(plans)
    for path, new in new_ranks.items():
        changed[path] = _with_ranks(plans[path], new, config.scaling)
    return changed, directions


def principal_directions(c: Array, pair: Factors) -> tuple[Array, Array]:
    """V_r `[L, I, r]` of a stack of covariances, and λ_i / Σ λ `[L, r]`.

    Args:
      c: `[L, I, I]`.
      pair: its SVD's V_r √Λ_r `[L, I, r]`, and the transpose of that.
    """
    v, _ = pair
    roots = jnp.linalg.norm(v, axis=1)  # √λ
    variance = jnp.trace(c, axis1=1, axis2=2)[:, None]
    return v / nonzero(roots)[:, None], roots**2 / nonzero(variance)


def redistributed(
    ranks: Mapping[str, np.ndarray], explained: Mapping[str, np.ndarray], *, rho: float
) -> dict[str, np.ndarray]:
    """The ranks of all matrices by the variance that their directions explain.

    There are as many in all as before, and at most ρ r for a matrix. The first direction of every
    matrix stays, so that each keeps factors to train.

    Args:
      ranks: by module, r of the matrices of its stack `[L]`.
      explained: λ_i / Σ λ in falling order, `[L, R]`.
      rho: ρ.

    Raises:
      ValueError: there are fewer directions with any variance than ranks.
    """
    usable = {}
    for path, r in ranks.items():
        largest = np.round(rho * r)[:, None]
        shares = np.where(np.arange(explained[path].shape[1]) < largest, explained[path], 0.0)
        adapted = r > 0
        if not (shares[adapted, 0] > NOISE).all():
            raise ValueError(
                f"{path}: its inputs do not vary over the calibration tokens; raise "
                "adapter.calibration_batches"
            )
        shares[adapted, 0] = np.inf  # chosen first
        usable[path] = shares
    budget = sum(int(r.sum()) for r in ranks.values())
    pooled = np.concatenate([shares.ravel() for shares in usable.values()])
    directions = int((pooled > NOISE).sum())
    if directions < budget:
        raise ValueError(
            f"the inputs vary in {directions} directions over the calibration tokens, fewer than the "
            f"{budget} ranks to initialize; raise adapter.calibration_batches or lower adapter.rank"
        )
    chosen = np.zeros(len(pooled), bool)
    chosen[np.argsort(-pooled, kind="stable")[:budget]] = True
    # Back to each module's share of the pool.
    new_ranks, end = {}, 0
    for path, shares in usable.items():
        begin, end = end, end + shares.size
        new_ranks[path] = chosen[begin:end].reshape(shares.shape).sum(1)
    return new_ranks


def _with_ranks(plan: Plan, ranks: np.ndarray, scaling: str) -> Plan:
    """The plan with other ranks and the scales that follow from them."""
    ranks = ranks.reshape(plan.ranks.shape)
    if scaling == "rank_stabilized":  # alpha ∝ r, so that alpha / √r ∝ √r
        factor = np.sqrt(ranks / np.maximum(plan.ranks, 1))
    else:
        factor = ranks > 0
    return dataclasses.replace(plan, ranks=ranks, scales=(plan.scales * factor).astype(np.float32))
