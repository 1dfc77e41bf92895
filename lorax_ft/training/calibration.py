"""Calibration: measuring what inits from data need, the layers' inputs or the kernels' gradients.

Statistics are as large as the matrices or larger: 40 GB for the inputs of Qwen2.5-7B's down_proj in
float32. So they are given one by one, and an init uses each before the next is measured.
Letters: B batch, T tokens, D width, L matrices of a stack, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.inits.svd import on_host
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.observe import moments, second_moments, with_inputs
from lorax_ft.lowrank.spec import base_kernel
from lorax_ft.lowrank.statistics import Measured, needed_statistics
from lorax_ft.models.decoder import Entry
from lorax_ft.models.model import HEAD, LAYERS, LoadedModel
from lorax_ft.quant.kernels import dense
from lorax_ft.schema import init_schema
from lorax_ft.training.losses import Batch, batch_loss
from lorax_ft.tree import Tree, from_modules, modules

GROUP_BYTES = 2**30
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Sums = dict[str, Array]


def calibrate(
    model: LoadedModel,
    config: AdapterConfig,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, np.ndarray]:
    """The statistics that `add_adapters(..., statistics=...)` needs for `config.init`, if any.

    All of them are held at once; `measured` gives them one by one.

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
    matrices = sum(math.prod(shape.shape[:-2]) for shape in shapes.values())
    found: dict[str, list[np.ndarray]] = {path: [] for path in shapes}
    for path, _, statistic in measured(model, config, batches, packed=packed):
        found[path].append(np.asarray(statistic))
        advance(1 / matrices)
    return {path: np.stack(parts).reshape(shapes[path].shape) for path, parts in found.items()}


def measured(
    model: LoadedModel,
    config: AdapterConfig,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool = False,
) -> Iterator[Measured]:
    """The statistics of `calibrate` one matrix at a time, in the order of each module's stack.

    The model runs over the batches while they are taken: its parameters must stay until the last.

    Args:
      model: measured as it is.
      config: the init and the modules.
      batches: `[B, T]` each.
      packed: whether rows hold several samples.

    Raises:
      ValueError: as `calibrate`.
    """
    shapes = needed_statistics(config, model.params, layout=model.layout)
    if not shapes:
        return
    if not batches:
        raise ValueError(f"adapter.init {config.init!r} starts from data, but there is no batch")
    statistic = init_schema(config.init).statistic
    if statistic == "gradient":
        yield from gradients(model, shapes, batches, packed=packed)
        return
    yield from input_moments(
        model, shapes, batches, packed=packed, centered=statistic == "covariance"
    )


def input_moments(
    model: LoadedModel,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
    centered: bool,
) -> Iterator[Measured]:
    """Σ xᵀ x / N `[I, I]` of modules' inputs x, or the covariance; padding does not count.

    All batches pass one step of the scan before the next one, so that the sums of one step's
    modules are held, and each batch still passes each layer once.

    Raises:
      ValueError: a module is not a Dense layer, or no token counts.
    """
    _check_dense(shapes, model.layout)
    inside = [path for path in shapes if path != HEAD]
    # Jitted here: this is the top of a computation of its own.
    enter = jax.jit(lambda params, batch: _entry(model, params, batch, packed).x)
    step = jax.jit(functools.partial(_observed_step, model, packed), donate_argnames=("x", "sums"))
    xs = [enter(model.params, batch) for batch in batches]
    for i in range(model.config.layers // model.config.period):
        sums = _zeros(shapes, inside)
        for n, batch in enumerate(batches):
            xs[n], sums = step(model.params, batch, jnp.int32(i), x=xs[n], sums=sums)
            # Before the next batch, or several of them would be in memory at once.
            jax.block_until_ready(sums)
        yield from _means(sums, i, centered=centered)
    if HEAD in shapes:
        leave = jax.jit(functools.partial(_observed_end, model), donate_argnames="sums")
        sums = _zeros(shapes, [HEAD])
        for x, batch in zip(xs, batches, strict=True):
            sums = leave(model.params, batch, x, sums=sums)
        yield from _means(sums, 0, centered=centered)


def _observed_step(
    model: LoadedModel,
    packed: bool,
    params: Tree,
    batch: Batch,
    i: Array,
    *,
    x: Array,
    sums: Sums,
) -> tuple[Array, Sums]:
    """x `[B, T, D]` behind step `i` of the scan, and the sums with its modules' inputs."""
    entry = _entry(model, params, batch, packed)._replace(x=x)
    names = {path.removeprefix(f"{LAYERS}/"): path for path in sums}
    x, inputs = with_inputs(model.step, names)(params, i, entry)
    weights = _weights(batch)
    added = {}
    for name, path in names.items():
        added[path] = sums[path] + moments(inputs[name], weights)
    return x, added


def _observed_end(model: LoadedModel, params: Tree, batch: Batch, x: Array, *, sums: Sums) -> Sums:
    """The sums with the inputs of the head, which is applied outside of the module."""
    features = model.leave(params, x)
    return {HEAD: sums[HEAD] + moments(features, _weights(batch))}


def _entry(model: LoadedModel, params: Tree, batch: Batch, packed: bool) -> Entry:
    """What the layers are given."""
    segments = batch["segment_ids"] if packed else None
    return model.enter(params, batch["tokens"], batch["positions"], segments)


def _weights(batch: Batch) -> Array:
    """1 for each token that is not padding, else 0, `[B, T]`."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)


def _zeros(shapes: Shapes, paths: Collection[str]) -> Sums:
    """Sums of no tokens yet, `[I + 1, I + 1]`."""
    zeros = {}
    for path in paths:
        size = shapes[path].shape[-1] + 1
        zeros[path] = jnp.zeros((size, size))
    return zeros


def _means(sums: Sums, i: int, *, centered: bool) -> Iterator[Measured]:
    """The statistics of the matrices at place `i`, each in place of its sum."""
    while sums:
        path, total = sums.popitem()
        on_this_host = on_host(total)
        _check_count(on_this_host[-1, -1])
        statistic = second_moments(on_this_host, centered=centered)
        del total, on_this_host
        yield Measured(path, i, statistic)


def gradients(
    model: LoadedModel,
    shapes: Shapes,
    batches: Sequence[Mapping[str, Any]],
    *,
    packed: bool,
) -> Iterator[Measured]:
    """∂L/∂W `[I, O]` of the matrices of modules, L the mean loss over the labeled tokens.

    A quantized kernel is dequantized to be differentiated, and a tied head gets its own kernel. One
    program measures as many modules as fit into `GROUP_BYTES`, and runs over all batches.
    """

    def measure(params: Tree, batch: Batch, shapes: Shapes) -> tuple[Sums, Array]:
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
            found[path] = canonical.reshape(-1, *shapes[path].shape[-2:])  # [L, I, O]
        return found, jnp.sum(batch["weights"])

    for group in _groups(shapes):
        sums, count = _summed(functools.partial(measure, shapes=group), model, batches)
        _check_count(count)
        while sums:
            path, total = sums.popitem()
            for i, matrix in enumerate(on_host(total)):
                yield Measured(path, i, matrix / count)
            del total


def _summed(
    measure: Callable[[Tree, Batch], tuple[Sums, Array]],
    model: LoadedModel,
    batches: Sequence[Mapping[str, Any]],
) -> tuple[Sums, float]:
    """What `measure` finds, summed over the batches on the device in float32, and the tokens."""
    # Jitted here: this is the top of a computation of its own.
    measure_batch = jax.jit(measure)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    total: Any = None
    for batch in batches:
        part = measure_batch(model.params, dict(batch))
        total = part if total is None else add(total, part)
        # Before the next batch, or several of them would be in memory at once.
        jax.block_until_ready(total)
    sums, count = total
    return sums, float(on_host(count))


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


def _check_dense(paths: Collection[str], layout: Layout) -> None:
    """Raise where a module is not a Dense layer."""
    for path in paths:
        module = layout[path].module
        if module != "dense":
            raise ValueError(
                f"{path} is of the type {module}, and only inputs of dense layers can be measured; "
                "remove it from adapter.targets, or use another adapter.init"
            )


def _check_count(count: float) -> None:
    """Raise if no token was measured."""
    if count == 0:
        raise ValueError("no token of the calibration batches counts; use other data")
