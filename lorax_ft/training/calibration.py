"""Calibration: measuring what inits from data need, the layers' inputs or the kernels' gradients.

One program measures as many modules as fit into `GROUP_BYTES`, and runs over all batches.
Letters: B batch, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.inits.svd import on_host
from lorax_ft.lowrank.observe import PROBE, WEIGHTS, observed, pass_by, second_moments
from lorax_ft.lowrank.spec import base_kernel
from lorax_ft.lowrank.statistics import needed_statistics
from lorax_ft.models.model import HEAD, LoadedModel
from lorax_ft.quant.kernels import dense
from lorax_ft.schema import init_schema
from lorax_ft.training.losses import Batch, batch_loss
from lorax_ft.tree import Tree, from_modules, modules

GROUP_BYTES = 2**30
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Measure = Callable[[Tree, Batch, Shapes], tuple[dict[str, Array], Array]]
"""(parameters, batch, shapes of the statistics) -> sums of the statistics, number of tokens."""
Sums = tuple[dict[str, np.ndarray], float]


def calibrate(
    model: LoadedModel,
    config: AdapterConfig,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, np.ndarray]:
    """The statistics that `add_adapters(..., statistics=...)` needs for `config.init`, if any.

    Args:
      model: measured as it is; quantized, where its base is.
      config: the init and the modules.
      batches: `[B, T]` each, as the training data gives them.
      packed: whether rows hold several samples, none of which may attend to another.
      advance: called with a share of the work whenever it is done; the shares make up 1.

    Returns:
      By module path, the covariance `[*L, I, I]` of the inputs of tokens that are not padding
      (EVA), their second moments (CorDA), or the gradient `[*L, I, O]` of the mean loss (LoRA-GA,
      LoRA-One).

    Raises:
      ValueError: there is no batch, no token in them counts, or a module's inputs cannot be
        measured.
    """
    shapes = needed_statistics(config, model.params, layout=model.layout)
    if not shapes:
        return {}
    if not batches:
        raise ValueError(f"adapter.init {config.init!r} starts from data, but there is no batch")
    statistic = init_schema(config.init).statistic
    measure = gradients if statistic == "gradient" else input_moments

    def advance_modules(count: float) -> None:
        advance(count / len(shapes))

    found: dict[str, np.ndarray] = {}
    for group in _groups(shapes):
        sums, count = measure(model, group, batches, packed=packed, advance=advance_modules)
        if count == 0:
            raise ValueError("no token of the calibration batches counts; use other data")
        for path, total in sums.items():
            if statistic == "gradient":
                mean = total / count
            else:
                mean = second_moments(total, centered=statistic == "covariance")
            found[path] = mean.astype(np.float32)
    return found


def input_moments(
    model: LoadedModel,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
    advance: Callable[[float], None] = lambda modules: None,
) -> Sums:
    """Σ [x, 1]ᵀ [x, 1] `[*L, I + 1, I + 1]` of modules' inputs x, and the number of tokens.

    Padding does not count.

    Raises:
      ValueError: a module is not a Dense layer.
    """
    for path in shapes:
        module = model.layout[path].module
        if module != "dense":
            raise ValueError(
                f"{path} is of the type {module}, and only inputs of dense layers can be measured; "
                "remove it from adapter.targets, or use another adapter.init"
            )

    def measure(params: Tree, batch: Batch, shapes: Shapes) -> tuple[dict[str, Array], Array]:
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        segments = batch["segment_ids"] if packed else None

        def any_scalar(probes: dict[str, Array]) -> Array:
            """Whatever is differentiated, the gradient of a probe is its layer's moments."""
            probed = _with_probes(params, probes, weights)
            run = observed(model.features)
            features, _ = run(probed, batch["tokens"], batch["positions"], segments)
            if HEAD in probes:  # the head is applied outside the module
                features = pass_by(features, probes[HEAD], weights)
            return jnp.sum(features.astype(jnp.float32))

        zeros = {}
        for path, shape in shapes.items():
            *stack, rows, columns = shape.shape
            zeros[path] = jnp.zeros((*stack, rows + 1, columns + 1))
        return jax.grad(any_scalar)(zeros), jnp.sum(weights)

    return _summed(measure, model, shapes, batches, advance)


def gradients(
    model: LoadedModel,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
    advance: Callable[[float], None] = lambda modules: None,
) -> Sums:
    """Σ ∂loss/∂W `[*L, I, O]` of modules over the labeled tokens, and the number of these.

    A quantized kernel is dequantized to be differentiated, and a tied head gets its own kernel.
    """

    def measure(params: Tree, batch: Batch, shapes: Shapes) -> tuple[dict[str, Array], Array]:
        layers = modules(params)
        kernels = {}
        for path in shapes:
            kernel = base_kernel(layers, path, model.layout[path])
            kernels[path] = dense(kernel, jnp.float32)

        def loss(kernels: dict[str, Array]) -> Array:
            changed = dict(layers)
            for path, kernel in kernels.items():
                changed[path] = layers.get(path, {}) | {"kernel": kernel}
            return batch_loss(model, from_modules(changed), batch, packed=packed)

        found = {}
        for path, gradient in jax.grad(loss)(kernels).items():
            canonical = model.layout[path].canonical("kernel", gradient)
            found[path] = canonical.reshape(shapes[path].shape)  # [*L, I, O]
        return found, jnp.sum(batch["weights"])

    return _summed(measure, model, shapes, batches, advance)


def _with_probes(params: Tree, probes: Mapping[str, Array], weights: Array) -> Tree:
    """The parameters with a probe and the tokens' weights beside the kernels to be observed."""
    layers = modules(params)
    for path, probe in probes.items():
        # Scans slice every leaf, so each layer of a stack needs the weights.
        stack = probe.shape[:-2]
        spread = jnp.broadcast_to(weights, (*stack, *weights.shape))
        layers[path] = layers.get(path, {}) | {PROBE: probe, WEIGHTS: spread}
    return from_modules(layers)


def _summed(
    measure: Measure,
    model: LoadedModel,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    advance: Callable[[float], None],
) -> Sums:
    """What `measure` finds, summed over the batches on the device in float32, and fetched."""
    # Jitted here: this is the top of a computation of its own.
    measure_batch = jax.jit(lambda params, batch: measure(params, batch, shapes))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    total: Any = None
    for batch in batches:
        part = measure_batch(model.params, dict(batch))
        total = part if total is None else add(total, part)
        # Before the next batch, or several of them would be in memory at once.
        jax.block_until_ready(total)
        advance(len(shapes) / len(batches))
    sums, count = total
    host_sums = {path: on_host(leaf) for path, leaf in sums.items()}
    return host_sums, float(on_host(count))


def _groups(shapes: Shapes) -> Iterator[Shapes]:
    """The modules in groups whose statistics fit into `GROUP_BYTES` together, or that hold one."""
    group: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
    for path, shape in shapes.items():
        bytes_ = 4 * shape.size
        if group and size + bytes_ > GROUP_BYTES:
            yield group
            group = {}
            size = 0
        group[path] = shape
        size += bytes_
    yield group
