"""Measuring what the inits that start from data need, on batches of it: the layers' inputs, or the kernels' gradients.

One program measures as many modules as fit into `GROUP_BYTES`, and runs over all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.adapters import kernel_shapes, tied_kernel
from lorax_ft.lowrank.observe import PROBE, WEIGHTS, observed, pass_by, second_moments
from lorax_ft.lowrank.statistics import STATISTICS, needed_statistics
from lorax_ft.lowrank.svd import on_host
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import dense
from lorax_ft.training.step import Batch, batch_loss
from lorax_ft.tree import Tree, from_modules, modules

GROUP_BYTES = 2**30
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Measures = Callable[[Tree, Batch, Shapes], tuple[dict[str, Array], Array]]


def calibrate(
    model: Model,
    config: AdapterConfig,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, np.ndarray]:
    """The statistics that `add_adapters(..., statistics=...)` takes for `config.init`; none where it needs no data.

    Args:
      model: measured as it is; quantized, where its base is.
      config: the init and the modules.
      batches: `[B, T]` each, as the training data gives them.
      packed: whether rows hold several samples, none of which attends to another.
      advance: called with a share of the work whenever it is done; the shares make up 1.

    Returns:
      By module path, the covariance `[*L, I, I]` of the inputs of tokens that are no padding (EVA), their second
      moments (CorDA), or the gradient `[*L, I, O]` of the mean loss (LoRA-GA, LoRA-One).

    Raises:
      ValueError: there is no batch, nothing in them counts, or a module's inputs cannot be measured.
    """
    shapes = needed_statistics(
        config, layout=model.layout, shapes=kernel_shapes(model.params, model.layout)
    )
    if not shapes:
        return {}
    if not batches:
        raise ValueError(
            f"adapter.init {config.init!r} starts from data, and there is no batch of it"
        )
    kind = STATISTICS[config.init]
    measure = gradients if kind == "gradient" else input_moments
    found: dict[str, np.ndarray] = {}
    for group in _groups(shapes):
        sums, count = measure(
            model, group, batches, packed=packed, advance=lambda n: advance(n / len(shapes))
        )
        if count == 0:
            raise ValueError("no token of the calibration batches counts; give other data")
        for path, total in sums.items():
            centered = kind == "covariance"
            found[path] = (
                total / count if kind == "gradient" else second_moments(total, centered=centered)
            )
    return {path: statistic.astype(np.float32) for path, statistic in found.items()}


def input_moments(
    model: Model,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
    advance: Callable[[float], None] = lambda modules: None,
) -> tuple[dict[str, np.ndarray], float]:
    """Σ [x, 1]ᵀ [x, 1] `[*L, I + 1, I + 1]` of the inputs x of modules over tokens that are no padding, and how many.

    Raises:
      ValueError: a module is no Dense layer.
    """
    for path in shapes:
        if model.layout[path].kind != "dense":
            raise ValueError(
                f"{path} is {model.layout[path].kind}, and inputs are measured of dense layers only; leave it out of "
                "adapter.targets, or take another adapter.init"
            )

    def measures(params: Tree, batch: Batch, shapes: Shapes) -> tuple[dict[str, Array], Array]:
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        segments = batch["segment_ids"] if packed else None

        def any_scalar(probes: dict[str, Array]) -> Array:
            layers = modules(params)
            for path, probe in probes.items():
                spread = jnp.broadcast_to(weights, (*probe.shape[:-2], *weights.shape))
                layers[path] = layers.get(path, {}) | {PROBE: probe, WEIGHTS: spread}
            run = observed(model.features)
            features, _ = run(from_modules(layers), batch["tokens"], batch["positions"], segments)
            if "lm_head" in probes:  # which is applied outside the module
                features = pass_by(features, probes["lm_head"], weights)
            return jnp.sum(features.astype(jnp.float32))

        zeros = {
            p: jnp.zeros((*s.shape[:-2], s.shape[-2] + 1, s.shape[-1] + 1))
            for p, s in shapes.items()
        }
        return jax.grad(any_scalar)(zeros), jnp.sum(weights)

    return _summed(measures, model, shapes, batches, advance)


def gradients(
    model: Model,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
    advance: Callable[[float], None] = lambda modules: None,
) -> tuple[dict[str, np.ndarray], float]:
    """Σ ∂loss/∂W `[*L, I, O]` of modules over the labeled tokens, and how many these are.

    A quantized kernel is dequantized, and a tied head has a kernel of its own, to be differentiated.
    """

    def measures(params: Tree, batch: Batch, shapes: Shapes) -> tuple[dict[str, Array], Array]:
        layers = modules(params)
        kernels = {path: layers.get(path, {}).get("kernel") for path in shapes}
        own = {
            p: dense(tied_kernel(params) if k is None else k, jnp.float32)
            for p, k in kernels.items()
        }

        def loss(kernels: dict[str, Array]) -> Array:
            changed = {
                path: layers.get(path, {}) | {"kernel": kernel} for path, kernel in kernels.items()
            }
            return batch_loss(model, from_modules(layers | changed), batch, packed=packed)

        found = jax.grad(loss)(own)
        canonical = {
            p: model.layout[p].canonical("kernel", g).reshape(shapes[p].shape)
            for p, g in found.items()
        }
        return canonical, jnp.sum(batch["weights"])

    return _summed(measures, model, shapes, batches, advance)


def _summed(
    measures: Measures,
    model: Model,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    advance: Callable[[float], None],
) -> tuple[dict[str, np.ndarray], float]:
    """What `measures` finds, added up over the batches on the device, in float32, and fetched."""

    @jax.jit
    def first(params: Tree, batch: Batch) -> tuple[dict[str, Array], Array]:
        return measures(params, batch, shapes)

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    total: Any = None
    for batch in batches:
        part = first(model.params, dict(batch))
        total = part if total is None else add(total, part)
        jax.block_until_ready(total)
        advance(len(shapes) / len(batches))
    sums, count = total
    return {path: on_host(leaf) for path, leaf in sums.items()}, float(on_host(count))


def _groups(shapes: Shapes) -> Iterator[Shapes]:
    """The modules in groups whose statistics fit into `GROUP_BYTES` together, or that hold one."""
    group: dict[str, jax.ShapeDtypeStruct] = {}
    for path, shape in shapes.items():
        if group and sum(4 * s.size for s in (*group.values(), shape)) > GROUP_BYTES:
            yield group
            group = {}
        group[path] = shape
    yield group
