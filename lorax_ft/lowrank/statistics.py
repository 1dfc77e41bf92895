"""What the inits that start from data are given: one statistic for every module, measured on calibration batches.

`lorax_ft.calibrate` measures them for the models of this library.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.eva import eva, redistributed
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.leaves import fold_path
from lorax_ft.lowrank.svd import svd
from lorax_ft.lowrank.targets import Plan, plan_adapters

Kind = Literal["covariance", "moment", "gradient"]
STATISTICS: dict[str, Kind] = {
    "eva": "covariance",
    "corda": "moment",
    "lora_ga": "gradient",
    "lora_one": "gradient",
}
"""Which inits need which: Σ (x − x̄)ᵀ (x − x̄) / N or Σ xᵀ x / N of the inputs, `[*L, I, I]`, or ∂L/∂W `[*L, I, O]`."""


def needed_statistics(
    config: AdapterConfig, *, layout: Layout, shapes: dict[str, tuple[int, ...]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the statistics that the init needs, by module path; none where it needs no data.

    Embeddings need none: they start at random.

    Args:
      config: the init and the modules.
      layout: the layers of the model.
      shapes: their kernels' shapes.

    Raises:
      ValueError: as `plan_adapters`; or LoRA-GA's 2 r singular vectors are more than a gradient has.
    """
    kind = STATISTICS.get(config.init)
    needed = {}
    for path, plan in plan_adapters(config, layout=layout, shapes=shapes).items() if kind else ():
        if layout[path].kind == "embed":
            continue
        stack, rows, columns = layout[path].sizes(shapes[path])
        if config.init == "lora_ga" and 2 * plan.ranks.max() > min(rows, columns):
            raise ValueError(
                f"{path}: LoRA-GA of rank {plan.ranks.max()} takes {2 * plan.ranks.max()} singular vectors, more than "
                f"its matrix of {rows} × {columns} has; lower adapter.rank"
            )
        shape = (*stack, rows, columns if kind == "gradient" else rows)
        needed[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return needed


def checked_statistics(
    config: AdapterConfig,
    given: Mapping[str, Array | np.ndarray],
    needed: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """The statistics that are needed, each `[L, ...]` with one stack axis.

    Raises:
      ValueError: one is missing, has another shape, is not finite, or is 0 for some matrix.
    """
    found = {}
    for path, shape in needed.items():
        if path not in given:
            raise ValueError(
                f"adapter.init {config.init!r} starts from data, and there is no statistic of {path}; measure it with "
                "lorax_ft.calibrate and pass it as statistics="
            )
        if given[path].shape != shape.shape:
            raise ValueError(
                f"the {STATISTICS[config.init]} of {path} is {given[path].shape}; it must be {shape.shape}"
            )
        found[path] = jnp.asarray(given[path]).reshape(-1, *shape.shape[-2:])
        if not isinstance(found[path], jax.core.Tracer):
            sizes = jnp.max(jnp.abs(found[path]), axis=(1, 2))
            if not bool(jnp.all(jnp.isfinite(sizes) & (sizes > 0))):
                raise ValueError(
                    f"the {STATISTICS[config.init]} of {path} is 0 or not finite in matrix "
                    f"{int(jnp.argmin(jnp.isfinite(sizes) & (sizes > 0)))} of its stack; give other calibration batches"
                )
    return found


def spread_ranks(
    plans: Mapping[str, Plan],
    covariances: Mapping[str, Array],
    config: AdapterConfig,
    *,
    key: Array,
) -> tuple[dict[str, Plan], dict[str, Array]]:
    """EVA: the plans with the ranks where they explain most, and the directions `[L, I, R]` that A is to start from.

    Alpha follows a matrix's rank, as in PEFT, so that alpha / r is what it was.
    """
    plans, directions, explained = dict(plans), {}, {}
    for path, c in covariances.items():
        keys = jax.random.split(fold_path(key, path), len(c))
        decomposed = functools.partial(
            svd, rank=plans[path].width, iterations=config.svd_iterations, keys=keys
        )
        directions[path], explained[path] = eva(c, svd=decomposed)
    traced = any(
        isinstance(share, jax.core.Tracer) for share in explained.values()
    )  # for the shapes alone
    if config.eva_rho == 1 or not explained or traced:
        return plans, directions
    before = {path: plans[path].ranks.reshape(-1) for path in explained}
    shares = {path: np.asarray(share) for path, share in explained.items()}
    for path, new in redistributed(before, shares, rho=config.eva_rho).items():
        plan = plans[path]
        ranks = new.reshape(plan.ranks.shape)
        grown = (
            np.sqrt(ranks / np.maximum(plan.ranks, 1))
            if config.scaling == "rank_stabilized"
            else ranks > 0
        )
        plans[path] = dataclasses.replace(
            plan, ranks=ranks, scales=(plan.scales * grown).astype(np.float32)
        )
    return plans, directions
