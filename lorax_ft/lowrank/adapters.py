"""Adding adapters to a parameter tree, disabling them, and the further leaves that a step needs.

{"up_proj": {"kernel": W}}
→  {"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.inits import Init, find_function
from lorax_ft.lowrank.keys import fold_path
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.module_leaves import adapter_leaves, leaf_shapes, without_start
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.shared import initial_shared, shared_shapes
from lorax_ft.lowrank.spec import LayerSpec, base_kernel, base_shape, with_kernel
from lorax_ft.lowrank.starts import find_starts, stack_of
from lorax_ft.lowrank.statistics import Statistics, needed_statistics, one_by_one
from lorax_ft.lowrank.targets import plan_adapters
from lorax_ft.lowrank.terms import (
    TERMS,
    check_layer,
    dropout,
    is_adapted,
    kept_start,
    low_rank,
    scale_leaves,
    tokens,
)
from lorax_ft.lowrank.terms import magnitude as magnitude_term
from lorax_ft.lowrank.watch import check_tree
from lorax_ft.mesh_axes import has_explicit_axes, in_auto_axes, with_auto_axes
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.schema import init_schema, is_soft_prompt, leaf_schema
from lorax_ft.tree import Layer, Tree, combine, from_modules, modules, split


def add_adapters(
    params: Tree,
    config: AdapterConfig,
    *,
    layout: Layout,
    key: Array,
    init: Init | None = None,
    originals: Mapping[str, Original] = MappingProxyType({}),
    rounds: int = 1,
    statistics: Statistics = MappingProxyType({}),
    donate: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> Tree:
    """The parameters with adapter leaves beside the kernels that `config.targets` matches.

    A bottleneck beside a whole module, such as an MLP, has its leaves at the module's own path.

    Args:
      params: a tree of arrays; its leaves are shared with the result, not copied.
      config: which modules, rank and init. Its `train_whole` and `freeze` are for `partition`, and
        its `dropout` for `with_dropout`.
      layout: the layers of the model (`lorax_ft.layout`, or a loaded model's own).
      key: every leaf's randomness is folded from it and the leaf's path.
      init: a custom init, in place of the one that `config.init` names: a function of an
        `InitContext` that returns an `InitResult` (`lorax_ft.lowrank.inits.context`).
      originals: by path, reads the matrices that are quantized in `params` in full precision
        (`Model.originals`); needed by inits that change the base.
      rounds: of decomposition and quantization, for PiSSA and LoftQ on a quantized base.
      statistics: what inits from data start from: by path (`lorax_ft.calibrate`), or one by one
        (`lorax_ft.training.calibration.measured`), of which one at a time is held.
      donate: whether the kernels of `params` that the init changes are consumed, as by `jax.jit`'s
        `donate_argnums`: the old base is then not held beside the new one, and cannot be used. Not
        on a mesh of Explicit axes.
      advance: called with a share of the work whenever it is done; the shares make up 1.

    Returns:
      A new tree. Only inits whose row in `lorax_ft.schema.INITS` says `changes_base` change the
      base, and not with `keep_base`.

    Raises:
      ValueError: a pattern matches no module, a matrix is too small for its rank, a statistic is
        missing, or the init computes on the host and `params` are being traced.

    A custom init needs no change to this library:

    >>> from lorax_ft.lowrank.inits.context import InitContext, InitResult
    >>> def ones(context: InitContext) -> InitResult:
    ...     return InitResult((context.zeros_a() + 1, context.zeros_b()))
    >>> from lorax_ft.lowrank.layout import layout
    >>> dense = nn.Dense(3)
    >>> params = dense.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    >>> layers = layout(dense.apply, params, jnp.ones((1, 4)))
    >>> config, key = AdapterConfig(rank=2), jax.random.key(1)
    >>> float(add_adapters(params, config, layout=layers, key=key, init=ones)["lora_a"].sum())
    8.0
    """
    check_tree(params, name="add_adapters")
    if has_explicit_axes(params):
        # Keys of random numbers may lie on the mesh too.
        return cast(
            Tree,
            with_auto_axes(
                lambda given: add_adapters(
                    given[0],
                    config,
                    layout=layout,
                    key=given[1],
                    init=init,
                    originals=originals,
                    rounds=rounds,
                    statistics=statistics,
                    advance=advance,
                ),
                (params, key),
                keep=params,
            ),
        )
    layers = modules(nn.meta.unbox(params))
    _check_init(config, init, layers)
    row = init_schema(config.init)
    # Whether a custom init changes the base is only known once it is called.
    changes_base = row.changes_base or init is not None
    plans = plan_adapters(config, params, layout=layout, changes_base=changes_base)
    stacks = {}
    for path, plan in plans.items():
        layer = _unadapted_layer(layers, path)
        # A custom init cannot requantize the base.
        needs_original = plan.start == "in_base" and init is None
        original = _original(originals, path, layer) if needs_original else None
        if low_rank.planned(plan):
            kernel = base_kernel(layers, path, layout[path])
            stacks[path] = stack_of(kernel, plan, init, original, key=key, rounds=rounds)
    needed = needed_statistics(config, params, layout=layout)
    starts = find_starts(
        stacks,
        one_by_one(statistics, needed, init=config.init),
        measured=needed,
        advance=advance,
    )
    stacks.clear()  # It holds the kernels.
    if init is None and row.choose_ranks is not None:
        explained = {path: np.asarray(starts[path].explained) for path in needed}
        plans = find_function(row.choose_ranks)(plans, explained, config)
    layers[""] = layers.get("", {}) | initial_shared(plans.values(), key)
    # The base stays until all is measured.
    for path, plan in plans.items():
        layers[path] = layers.get(path, {}) | adapter_leaves(
            None if plan.spec.module == "block" else base_kernel(layers, path, plan.spec),
            plan=plan,
            start=starts.pop(path, None),
            key=key,
            original=originals.get(path) if init is None else None,
            donate=donate,
        )
    return from_modules(layers)


def abstract_adapters(config: AdapterConfig, params: Tree, *, layout: Layout) -> Tree:
    """The shapes of the leaves that `add_adapters` adds, as `jax.ShapeDtypeStruct`.

    Nothing is computed and no init runs: the shapes follow from the layers and the config.

    Args:
      config: the adapters.
      params: the model's parameters, or their shapes.
      layout: the layers of the model.

    Raises:
      ValueError: as `plan_adapters`.
    """
    layers = modules(nn.meta.unbox(params))
    plans = plan_adapters(config, params, layout=layout)
    found: dict[str, Layer] = {"": {}}
    for name, shape in shared_shapes(plans.values()).items():
        found[""][name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, plan in plans.items():
        spec = layout[path]
        shapes = leaf_shapes(plan, base_shape(layers, path, spec))
        found.setdefault(path, {})
        for name, shape in shapes.items():
            stored = spec.stored_shape(name, shape)
            dtype = leaf_schema(name).dtype
            found[path][name] = jax.ShapeDtypeStruct(stored, dtype)
    return from_modules(found)


def attach_adapters(
    base: Tree,
    adapters: Tree,
    *,
    layout: Layout,
    originals: Mapping[str, Original] = MappingProxyType({}),
) -> Tree:
    """The base with adapter leaves put back on it: W − s A₀ B₀ is computed again from A₀ and B₀.

    Args:
      base: the parameters as they were loaded.
      adapters: adapter leaves, as `partition(params, by="ownership")` gives them.
      layout: the layers of the model.
      originals: as in `add_adapters`.

    Raises:
      ValueError: leaves that belong together are not all there.
    """
    layers = modules(combine(base, adapters))
    for path, layer in layers.items():
        check_layer(layer, path)
        if kept_start.is_in_base(layer):
            spec = layout[path]
            original = _original(originals, path, layer)
            kernel = without_start(layer[spec.weight], layer, spec=spec, original=original)
            layers[path] = layer | {spec.weight: kernel}
    return from_modules(layers)


def disable_adapters(params: Tree, base: Tree, *, layout: Layout) -> Tree:
    """The parameters with all adapters disabled, in the same structure, so that nothing recompiles.

    Weights that were trained in full are the base's again. The leaf that says which matrices are
    adapted becomes 0, such as s. Where an init changed the base, A and B become A₀ and B₀ instead,
    W − s A₀ B₀ + s A₀ B₀ = W, and DoRA's magnitude becomes the norm of W. A soft prompt is left
    out; texts then have no virtual tokens.

    Args:
      params: a tree with adapters.
      base: the model's own parameters, as they were loaded.
      layout: the layers of the model.
    """
    params, _ = split(params, lambda path: not is_soft_prompt(path))
    layers, own = modules(params), modules(base)
    for path, layer in layers.items():
        check_layer(layer, path)
        if not kept_start.is_in_base(layer):
            layer = layer | _base_weights(path, layer, own, layout)
        layers[path] = layer | _disabled(layer, path, layout)
    return from_modules(layers)


def with_norms(params: Tree, *, layout: Layout) -> Tree:
    """The parameters with DoRA's norm ‖W + s A B‖ beside every magnitude; derived, never stored.

    Args:
      params: a tree with adapters.
      layout: the layers of the model.
    """
    return combine(params, norms(params, layout=layout))


def norms(params: Tree, *, layout: Layout) -> Tree:
    """The `norm` leaves that are missing, as `with_norms` adds them.

    They change only when A and B do.
    """
    layers = modules(params)
    found: dict[str, Layer] = {}
    for path, layer in layers.items():
        check_layer(layer, path)
        if magnitude_term.MAGNITUDE in layer and magnitude_term.NORM not in layer:
            spec = layout[path]
            full = with_kernel(layers, path, spec)
            like = functools.partial(_sum_over_inputs, spec)
            norm = in_auto_axes(magnitude_term.column_norm, full, like=like)
            found[path] = {magnitude_term.NORM: norm}
    return from_modules(found)


def _sum_over_inputs(spec: LayerSpec, layer: Layer) -> Array:
    """An array of the norm's axes, split over devices as the norm should be."""
    n_stack = len(spec.stack)
    in_axes = tuple(range(n_stack, n_stack + len(spec.ins)))
    return dense(layer["kernel"]).sum(in_axes)


def with_dropout(params: Tree, key: Array, *, rate: float) -> Tree:
    """The parameters with a dropout key and rate beside every adapter that drops out its input.

    Args:
      params: a tree with adapters.
      key: each matrix's key is folded from it and the path.
      rate: the share of the adapter branch's input to drop; 0 returns the tree as it is.
    """
    if rate == 0:
        return params
    # `jax.random.PRNGKey` returns raw integers, which `jax.random.split` would give another axis.
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    layers = modules(params)
    for path, layer in layers.items():
        for term in TERMS:
            if term.takes_dropout and term.active in layer:
                stack = layer[term.active].shape
                path_key = fold_path(key, path)
                layers[path] = layer | dropout.leaves(path_key, rate, stack=stack)
    return from_modules(layers)


def _base_weights(
    path: str,
    layer: Layer,
    own: Mapping[str, Layer],
    layout: Layout,
) -> Layer:
    """The base's own leaves of a layer, in the dtypes that the layer has them in."""
    old = own.get(path, {})
    spec = layout.get(path)
    if spec is not None and spec.tied_to is not None and spec.weight in layer:
        old = {spec.weight: base_kernel(own, path, spec)}  # also of a head that was untied
    return {
        name: old[name].astype(leaf.dtype)
        for name, leaf in layer.items()
        if name in old and not isinstance(leaf, Quantized)
    }


def _disabled(layer: Layer, path: str, layout: Layout) -> Layer:
    """The leaves with which an adapted layer computes what its base does."""
    if not kept_start.is_in_base(layer):
        return {name: jnp.zeros_like(layer[name]) for name in scale_leaves(layer)}
    start = {low_rank.A: layer[kept_start.A0], low_rank.B: layer[kept_start.B0]}
    if magnitude_term.MAGNITUDE not in layer:
        return start
    at_start = with_kernel({path: layer | start}, path, layout[path])
    n = magnitude_term.column_norm(at_start)
    # m = n, so that the magnitude changes nothing.
    disabled = start | {magnitude_term.MAGNITUDE: n}
    if magnitude_term.NORM in layer:
        disabled[magnitude_term.NORM] = n
    return disabled


def _original(originals: Mapping[str, Original], path: str, layer: Layer) -> Original | None:
    """Reads W again, where a start is subtracted from a quantized base."""
    if isinstance(layer.get("kernel"), Quantized) and path not in originals:
        raise ValueError(
            f"{path}: its kernel is quantized and the original weights are not available, so the "
            "init cannot change it; load the original checkpoint, or set adapter.keep_base"
        )
    return originals.get(path)


def _unadapted_layer(layers: Mapping[str, Layer], path: str) -> Layer:
    """The leaves of the module at `path`, which must not have an adapter yet."""
    layer = layers.get(path, {})
    if tokens.IDS in layer:
        raise ValueError(
            f"{path} has trainable tokens, so it can have no other adapter; leave it out of "
            "adapter.targets"
        )
    if is_adapted(layer):
        raise ValueError(f"{path} has an adapter already; merge it first (lorax_ft.merge_adapters)")
    return layer


def _check_init(config: AdapterConfig, init: Init | None, layers: Mapping[str, Layer]) -> None:
    """Raise for a custom init of another method, and for a host init under a transformation."""
    if init is not None:
        if config.method != "lora":
            raise ValueError(f"init= is for LoRA, and adapter.method is {config.method}")
        return
    if not init_schema(config.init).on_host or config.svd_iterations is not None:
        return
    leaves = jax.tree.leaves(dict(layers))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            f"adapter.init {config.init} computes an exact SVD on the host, outside jit and "
            "eval_shape; call add_adapters there, set adapter.svd_iterations, or use "
            "lorax_ft.abstract_adapters for shapes"
        )
