"""Adding adapters to a parameter tree, switching them off, and what a step needs beside them.

{"up_proj": {"kernel": W}}  →  {"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.leaves import Kernel, adapter_leaves, fold_path, without_start
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, Layer, column_norm
from lorax_ft.lowrank.requantize import Original
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.lowrank.starts import CHANGES_BASE
from lorax_ft.lowrank.statistics import checked_statistics, needed_statistics, spread_ranks
from lorax_ft.lowrank.targets import plan_adapters
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, combine, from_modules, modules


def add_adapters(
    params: Tree,
    config: AdapterConfig,
    *,
    layout: Layout,
    key: Array,
    originals: Mapping[str, Original] = MappingProxyType({}),
    rounds: int = 1,
    statistics: Mapping[str, Array | np.ndarray] = MappingProxyType({}),
    advance: Callable[[float], None] = lambda share: None,
) -> Tree:
    """The parameters with low-rank leaves beside the kernels that `config.targets` matches.

    Args:
      params: a tree of arrays; its leaves are shared with the result, not copied.
      config: which modules, which rank, which start. Its `train_whole` and `freeze` are for `partition`, and its
        `dropout` for `with_dropout`.
      layout: the layers of the model (`lorax_ft.layout`, or a loaded model's own).
      key: every leaf's randomness is folded from it and the leaf's path.
      originals: by path, what reads the matrices again that are quantized in `params` (`Model.originals`); needed by
        inits that change the base.
      rounds: of decomposition and quantizing, for PiSSA and LoftQ on a quantized base.
      statistics: by path, what inits from data start from (`lorax_ft.calibrate`).
      advance: called with a share of the work whenever it is done; the shares make up 1.

    Returns:
      A new tree. The base is changed only by inits that say so (`CHANGES_BASE`), and not with `keep_base`.

    Raises:
      ValueError: a pattern matches no module, a rank is above a matrix's smaller side, or a statistic is missing.
    """
    layers = modules(nn.meta.unbox(params))
    kernels = {path: _kernel(layers, path, spec) for path, spec in layout.items()}
    shapes = {path: kernel.shape for path, kernel in kernels.items()}
    plans = plan_adapters(config, layout=layout, shapes=shapes)
    measured = checked_statistics(
        config, statistics, needed_statistics(config, layout=layout, shapes=shapes)
    )
    if config.init == "eva":
        plans, measured = spread_ranks(plans, measured, config, key=key)
    for path, plan in plans.items():
        layer = layers.get(path, {})
        if ADAPTER_LEAVES & layer.keys():
            raise ValueError(
                f"{path} has an adapter already; merge it first (lorax_ft.merge_adapters)"
            )
        # A tied head's kernel is the embedding's, and stays.
        keeps = config.keep_base or (path == "lm_head" and "kernel" not in layer)
        original = (
            None if keeps or config.init not in CHANGES_BASE else _original(originals, path, layer)
        )
        layers[path] = layer | adapter_leaves(
            kernels[path],
            config,
            spec=layout[path],
            plan=plan,
            key=key,
            keeps=keeps,
            original=original,
            rounds=rounds,
            statistic=measured.get(path),
        )
        advance(1 / len(plans))
    return from_modules(layers)


def attach_adapters(
    base: Tree,
    adapters: Tree,
    *,
    layout: Layout | None = None,
    originals: Mapping[str, Original] = MappingProxyType({}),
) -> Tree:
    """An original base with adapter leaves put back on it: W − s A₀ B₀ is computed again from the kept start.

    Args:
      base: the parameters as they were loaded.
      adapters: adapter leaves, as `partition(params, by="ownership")` gives them.
      layout: needed where a kernel's axes are not in the order stack, in, out.
      originals: as in `add_adapters`.
    """
    layers = modules(combine(base, adapters))
    for path, layer in layers.items():
        if "lora_a0" in layer and "start_scale" not in layer:
            original = _original(originals, path, layer)
            layers[path] = layer | without_start(layer, layout[path] if layout else None, original)
    return from_modules(layers)


def disable_adapters(params: Tree, base: Tree, *, layout: Layout | None = None) -> Tree:
    """The parameters with all adapters switched off, in the same structure: no program is compiled anew.

    Modules trained whole are the base's again. s becomes 0; where an init changed the base, A and B become the start
    instead, W − s A₀ B₀ + s A₀ B₀ = W, and DoRA's magnitude the norm of W.

    Args:
      params: a tree with adapters.
      base: the model's own parameters, as they were loaded.
      layout: needed where a kernel's axes are not in the order stack, in, out.
    """
    layers, own = modules(params), modules(base)
    for path, layer in layers.items():
        if "lora_a0" not in layer or "start_scale" in layer:
            old = own.get(path, {})
            if "kernel" in layer and "kernel" not in old:  # a head that was untied
                old = {"kernel": tied_kernel(base)}
            same = {
                name for name in layer.keys() & old.keys() if not isinstance(layer[name], Quantized)
            }
            layer = layer | {name: old[name].astype(layer[name].dtype) for name in same}
            layers[path] = layer
        if "lora_a0" in layer and "start_scale" not in layer:
            layer = layer | {"lora_a": layer["lora_a0"], "lora_b": layer["lora_b0"]}
            if "magnitude" in layer:
                n = column_norm(as_canonical(layer, layout[path] if layout else None))
                layer |= {name: n for name in ("magnitude", "norm") if name in layer}
            layers[path] = layer
        elif "lora_a" in layer:
            scales = {name: layer[name] for name in ("lora_scale", "start_scale") if name in layer}
            layers[path] = layer | {name: jnp.zeros_like(s) for name, s in scales.items()}
    return from_modules(layers)


def with_norms(params: Tree, *, layout: Layout | None = None) -> Tree:
    """The parameters with DoRA's detached norm ‖W + s A B‖ beside every magnitude; derived, never stored.

    Args:
      params: a tree with adapters.
      layout: needed where a kernel's axes are not in the order stack, in, out.
    """
    return combine(params, norms(params, layout=layout))


def norms(params: Tree, *, layout: Layout | None = None) -> Tree:
    """The `norm` leaves alone, as `with_norms` adds them: they change only when A and B do."""
    found: dict[str, Layer] = {}
    for path, layer in modules(params).items():
        if "magnitude" in layer:
            base = {} if {"kernel", "embedding"} & layer.keys() else {"kernel": tied_kernel(params)}
            found[path] = {
                "norm": column_norm(as_canonical(layer | base, layout[path] if layout else None))
            }
    return from_modules(found)


def with_dropout(params: Tree, key: Array, *, rate: float) -> Tree:
    """The parameters with a dropout key and rate beside every A, for one training step.

    Args:
      params: a tree with adapters.
      key: each matrix's key is folded from it and the path.
      rate: the share of the adapter branch's input to drop; 0 returns the tree as it is.
    """
    if rate == 0:
        return params
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    layers = modules(params)
    for path, layer in layers.items():
        if "lora_a" in layer:
            stack = layer["lora_scale"].shape
            one = fold_path(key, path)
            layer["dropout_key"] = jax.random.split(one, stack) if stack else one
            layer["dropout_rate"] = jnp.full(stack, rate, jnp.float32)
    return from_modules(layers)


def kernel_shapes(params: Tree, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels of a layout's modules, in `params` or their shapes."""
    layers = modules(nn.meta.unbox(params))

    def shape(path: str) -> tuple[int, ...]:
        layer = layers.get(path, {})
        own = [layer[name].shape for name in ("kernel", "embedding") if name in layer]
        return own[0] if own else layers["embed_tokens"]["embedding"].shape[::-1]  # a tied head

    return {path: shape(path) for path in layout}


def _kernel(layers: dict[str, Layer], path: str, spec: LayerSpec) -> Kernel:
    layer = layers.get(path, {})
    if spec.kind == "embed":
        return layer["embedding"]
    return layer["kernel"] if "kernel" in layer else layers["embed_tokens"]["embedding"].T


def tied_kernel(params: Tree) -> Array:
    """The kernel of a tied output head."""
    return params["embed_tokens"]["embedding"].T


def _original(originals: Mapping[str, Original], path: str, layer: Layer) -> Original | None:
    """What reads W again, where a start is to be taken out of a quantized base."""
    if isinstance(layer.get("kernel"), Quantized) and path not in originals:
        raise ValueError(
            f"{path}: its kernel is quantized and the weights that it came from are not at hand, so no start can be "
            "taken out of it; load the original checkpoint, or set adapter.keep_base"
        )
    return originals.get(path)
