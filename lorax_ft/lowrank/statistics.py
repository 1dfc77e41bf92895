"""The statistics that inits from data use: one for each module, measured on calibration batches.

`lorax_ft.calibrate` measures them for the models of this library. Letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.targets import plan_adapters
from lorax_ft.schema import init_schema
from lorax_ft.tree import Tree, modules


def needed_statistics(
    config: AdapterConfig,
    params: Tree,
    *,
    layout: Layout,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the statistics that the init needs, by module path; empty if it needs no data.

    Embeddings need none, since they start at random.

    Args:
      config: the init and the modules.
      params: the model's parameters, or their shapes.
      layout: the layers of the model.

    Returns:
      `[*L, I, I]` for statistics of the inputs, `[*L, I, O]` for gradients, float32.

    Raises:
      ValueError: as `plan_adapters`; or LoRA-GA needs more singular vectors than a gradient has.
    """
    statistic = init_schema(config.init).statistic
    if statistic is None:
        return {}
    layers = modules(nn.meta.unbox(params))
    needed = {}
    for path, plan in plan_adapters(config, params, layout=layout).items():
        spec = layout[path]
        if spec.module == "embed":
            continue
        stack, rows, columns = spec.sizes(base_shape(layers, path, spec))
        vectors = 2 * int(plan.ranks.max())
        if config.init == "lora_ga" and vectors > min(rows, columns):
            raise ValueError(
                f"{path}: LoRA-GA of rank {vectors // 2} needs {vectors} singular vectors, more "
                f"than its matrix of {rows} × {columns} has; lower adapter.rank"
            )
        last = columns if statistic == "gradient" else rows
        needed[path] = jax.ShapeDtypeStruct((*stack, rows, last), jnp.float32)
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
    statistic = init_schema(config.init).statistic
    checked = {}
    for path, expected in needed.items():
        if path not in given:
            raise ValueError(
                f"adapter.init {config.init!r} starts from data, and there is no statistic of "
                f"{path}; measure it with lorax_ft.calibrate and pass it as statistics="
            )
        value = given[path]
        if value.shape != expected.shape:
            raise ValueError(
                f"the {statistic} of {path} is {value.shape}; it must be {expected.shape}"
            )
        stack = jnp.asarray(value).reshape(-1, *expected.shape[-2:])
        sizes = np.asarray(jnp.max(jnp.abs(stack), axis=(1, 2)))
        usable = np.isfinite(sizes) & (sizes > 0)
        if not usable.all():
            raise ValueError(
                f"the {statistic} of {path} is 0 or not finite in matrix {usable.argmin()} of its "
                "stack; use other calibration batches"
            )
        checked[path] = stack
    return checked
