"""EVA: A spans the directions in which a layer's inputs vary most, and B = 0 (2410.07170).

    C = Σ (x − x̄)ᵀ (x − x̄) / N = V Λ Vᵀ,   A = V_r,   B = 0

The ranks then go where directions explain most of the variance: the λ_i / Σ λ of all matrices are
sorted, and the largest are chosen, as many as there were ranks, with at most ρ r for a matrix. The
inputs are centered, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import Factors, nonzero
from lorax_ft.lowrank.plan import Plan

NOISE = 1e-7  # a share of the variance that float32 cannot distinguish from zero


def eva(context: InitContext) -> InitResult:
    """A from the directions of most variance, as many as `redistribute` may choose; B = 0."""
    c = context.measured
    pair = context.svd(c)
    directions, share = principal_directions(c, pair)
    return InitResult((directions, context.zeros_b()), explained=share)


def redistribute(
    plans: Mapping[str, Plan],
    explained: Mapping[str, np.ndarray],
    config: Any,
) -> dict[str, Plan]:
    """The plans with ranks where they explain most.

    Alpha follows a matrix's rank, as in PEFT, so that alpha / r stays.

    Args:
      plans: by module path, with room for ρ r directions.
      explained: by module path, λ_i / Σ λ in falling order, `[L, R]`.
      config: the AdapterConfig.
    """
    if config.eva_rho == 1 or not explained:
        return dict(plans)
    ranks = {path: plans[path].ranks.reshape(-1) for path in explained}
    new_ranks = redistributed(ranks, explained, rho=config.eva_rho)
    changed = dict(plans)
    for path, new in new_ranks.items():
        changed[path] = _with_ranks(plans[path], new, config.scaling)
    return changed


def principal_directions(c: Array, pair: Factors) -> tuple[Array, Array]:
    """V_r `[L, I, r]` of a stack of covariances, and λ_i / Σ λ `[L, r]`.

    Args:
      c: `[L, I, I]`.
      pair: its SVD's V_r √Λ_r `[L, I, r]`, and the transpose of that.
    """
    v, _ = pair
    roots = jnp.linalg.norm(v, axis=1)  # √λ
    variance = jnp.trace(c, axis1=1, axis2=2)[:, None]
    unit = v / nonzero(roots)[:, None]
    share = roots**2 / nonzero(variance)
    return unit, share


def redistributed(
    ranks: Mapping[str, np.ndarray],
    explained: Mapping[str, np.ndarray],
    *,
    rho: float,
) -> dict[str, np.ndarray]:
    """The ranks of all matrices by the variance that their directions explain.

    Their sum stays the same, and a matrix gets at most ρ r. Every matrix keeps its first direction,
    so that it has factors to train.

    Args:
      ranks: by module, r of the matrices of its stack `[L]`.
      explained: λ_i / Σ λ in falling order, `[L, R]`.
      rho: ρ.

    Raises:
      ValueError: there are fewer directions with any variance than ranks.
    """
    usable = {}
    budget = 0
    for path, r in ranks.items():
        usable[path] = _usable_shares(path, r, explained[path], rho=rho)
        budget += int(r.sum())
    pooled = np.concatenate([shares.ravel() for shares in usable.values()])
    directions = int((pooled > NOISE).sum())
    if directions < budget:
        raise ValueError(
            f"the inputs vary in {directions} directions over the calibration tokens, fewer than "
            f"the {budget} ranks to initialize; raise adapter.calibration_batches or lower "
            "adapter.rank"
        )
    # A stable sort, so that equal shares are chosen in the order of the modules.
    falling = np.argsort(-pooled, kind="stable")
    chosen = np.zeros(len(pooled), bool)
    chosen[falling[:budget]] = True
    # Each module's part of the pool gives its new ranks.
    new_ranks = {}
    start = 0
    for path, shares in usable.items():
        end = start + shares.size
        own = chosen[start:end].reshape(shares.shape)
        new_ranks[path] = own.sum(1)
        start = end
    return new_ranks


def _usable_shares(path: str, r: np.ndarray, explained: np.ndarray, *, rho: float) -> np.ndarray:
    """The shares `[L, R]` that may be chosen: 0 beyond ρ r, infinite for the first directions."""
    _, width = explained.shape
    largest = np.round(rho * r)[:, None]
    shares = np.where(np.arange(width) < largest, explained, 0.0)
    adapted = r > 0
    if not (shares[adapted, 0] > NOISE).all():
        raise ValueError(
            f"{path}: its inputs do not vary over the calibration tokens; raise "
            "adapter.calibration_batches"
        )
    shares[adapted, 0] = np.inf  # chosen first
    return shares


def _with_ranks(plan: Plan, ranks: np.ndarray, scaling: str) -> Plan:
    """The plan with other ranks and the scales that follow from them."""
    ranks = ranks.reshape(plan.ranks.shape)
    if scaling == "rank_stabilized":
        # alpha ∝ r, so that alpha / √r ∝ √r.
        ratio = ranks / np.maximum(plan.ranks, 1)
        factor = np.sqrt(ratio)
    else:
        factor = ranks > 0
    scales = (plan.scales * factor).astype(np.float32)
    return dataclasses.replace(plan, ranks=ranks, scales=scales)
