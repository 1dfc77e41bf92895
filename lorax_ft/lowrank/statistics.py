"""The statistics that inits from data use: one for each module, measured on calibration batches.

`lorax_ft.calibrate` measures them for the models of this library. Letters: I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.targets import plan_adapters
from lorax_ft.schema import init_schema
from lorax_ft.tree import Shape, Tree, modules


class Measured(NamedTuple):
    """The statistic of one matrix."""

    path: str
    """Of the module."""
    place: int
    """Of the matrix in the module's stack."""
    statistic: Array | np.ndarray
    """`[I, I]` of the inputs, or the gradient `[I, O]`."""


Statistics = Mapping[str, Array | np.ndarray] | Iterable[Measured]
"""Those of whole stacks by module path, `[*L, I, I]` or `[*L, I, O]`; or of single matrices."""


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
        needed[path] = jax.ShapeDtypeStruct((*stack, rows, last), np.float32)
    return needed


def one_by_one(
    statistics: Statistics,
    needed: Mapping[str, jax.ShapeDtypeStruct],
    *,
    init: str,
) -> Iterator[Measured]:
    """The statistics of single matrices that are needed, checked, as they are measured.

    Raises:
      ValueError: one is missing, has another shape, is not finite, or is 0 for some matrix.
    """
    statistic = init_schema(init).statistic
    if isinstance(statistics, Mapping):
        statistics = _of_stacks(statistics, needed)
    missing = {path: math.prod(shape.shape[:-2]) for path, shape in needed.items()}
    for one in statistics:
        if one.path not in needed:
            continue
        _check(one, needed[one.path].shape[-2:], f"the {statistic} of {one.path}")
        missing[one.path] -= 1
        yield one
    for path, count in missing.items():
        if count > 0:
            raise ValueError(
                f"adapter.init {init!r} starts from data, and there is no statistic of "
                f"{path}; measure it with lorax_ft.calibrate and pass it as statistics="
            )


def _of_stacks(
    given: Mapping[str, Array | np.ndarray],
    needed: Mapping[str, jax.ShapeDtypeStruct],
) -> Iterator[Measured]:
    """The statistics of stacks, as single ones."""
    for path, expected in needed.items():
        if path not in given:
            continue
        value = given[path]
        if value.shape != expected.shape:
            raise ValueError(
                f"the statistic of {path} is {value.shape}; it must be {expected.shape}"
            )
        matrices = value.reshape(-1, *expected.shape[-2:])
        for i, matrix in enumerate(matrices):
            yield Measured(path, i, matrix)


def _check(one: Measured, shape: Shape, what: str) -> None:
    """Raise where a statistic cannot be that of a matrix."""
    if one.statistic.shape != shape:
        raise ValueError(f"{what} is {one.statistic.shape}; it must be {shape}")
    # Two reductions, since |x| would be an array of its own.
    largest = max(float(one.statistic.max()), -float(one.statistic.min()))
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(
            f"{what} is 0 or not finite in matrix {one.place} of its stack; use other "
            "calibration batches"
        )
