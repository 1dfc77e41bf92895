"""Adding adapters to a parameter tree, switching them off, and what a step needs beside them.

{"up_proj": {"kernel": W}}  →  {"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}}
"""

from __future__ import annotations

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank import initial
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, Layer, column_norm, merged_kernel
from lorax_ft.lowrank.olora import olora
from lorax_ft.lowrank.pissa import pissa
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.lowrank.targets import Plan, plan_adapters
from lorax_ft.tree import Tree, combine, from_modules, modules

CHANGES_BASE = ("pissa", "olora")  # inits whose start is taken out of the base


def add_adapters(params: Tree, config: AdapterConfig, *, layout: Layout, key: Array) -> Tree:
    """The parameters with low-rank leaves beside the kernels that `config.targets` means.

    Args:
      params: a tree of arrays; its leaves are shared with the result, not copied.
      config: which modules, which rank, which start.
      layout: the layers of the model (`lorax_ft.layout`, or a loaded model's own).
      key: every leaf's randomness is folded from it and the leaf's path.

    Returns:
      A new tree. The base is changed only by inits that say so (PiSSA, OLoRA), and not with `keep_base`.

    Raises:
      ValueError: a pattern means no module, or a rank is above a matrix's smaller side.
    """
    layers = modules(nn.meta.unbox(params))
    kernels = {path: _kernel(layers, path, spec) for path, spec in layout.items()}
    for path, plan in plan_adapters(config, layout=layout, shapes={p: k.shape for p, k in kernels.items()}).items():
        layer = layers.get(path, {})
        if ADAPTER_LEAVES & layer.keys():
            raise ValueError(f"{path} has an adapter already; merge it first (lorax_ft.merge_adapters)")
        owns = path != "lm_head" or "kernel" in layer  # a tied head's kernel is the embedding's
        layers[path] = layer | _adapter(kernels[path], config, spec=layout[path], plan=plan, key=key, owns=owns)
    return from_modules(layers)


def attach_adapters(base: Tree, adapters: Tree, *, layout: Layout | None = None) -> Tree:
    """An original base with adapter leaves put back on it: W − s A₀ B₀ is computed again from the kept start.

    Args:
      base: the parameters as they were loaded.
      adapters: adapter leaves, as `partition(params, by="ownership")` gives them.
      layout: needed where a kernel's axes are not in the order stack, in, out.
    """
    layers = modules(combine(base, adapters))
    for path, layer in layers.items():
        if "lora_a0" in layer and "start_scale" not in layer:
            layers[path] = layer | _without_start(layer, layout[path] if layout else None)
    return from_modules(layers)


def switched_off(params: Tree, base: Tree, *, layout: Layout | None = None) -> Tree:
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
            layer = layer | {name: old[name].astype(layer[name].dtype) for name in layer.keys() & old.keys()}
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
            found[path] = {"norm": column_norm(as_canonical(layer | base, layout[path] if layout else None))}
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


def fold_path(key: Array, path: str) -> Array:
    """A key for the leaf or module at `path`."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _kernel(layers: dict[str, Layer], path: str, spec: LayerSpec) -> Array:
    layer = layers.get(path, {})
    if spec.kind == "embed":
        return layer["embedding"]
    return layer["kernel"] if "kernel" in layer else layers["embed_tokens"]["embedding"].T


def tied_kernel(params: Tree) -> Array:
    """The kernel of a tied output head."""
    return params["embed_tokens"]["embedding"].T


def _adapter(kernel: Array, config: AdapterConfig, *, spec: LayerSpec, plan: Plan, key: Array, owns: bool) -> Layer:
    """The leaves that one module gets, its kernel included where the init changes it."""
    w = spec.canonical("kernel", kernel)
    stack, rows, columns = spec.sizes(kernel.shape)
    n_in = len(spec.stack) + len(spec.ins)
    rank = int(plan.ranks.max())
    matrices = w.reshape(-1, rows, columns)
    a, b = _start(matrices, config, spec=spec, plan=plan, key=key)
    used = np.arange(rank) < plan.ranks.reshape(-1, 1)  # [L, r]: zero padding where a layer's rank is smaller
    a, b = jnp.where(used[:, None, :], a, 0), jnp.where(used[:, :, None], b, 0)
    scale = jnp.asarray(plan.scales)
    leaves = {
        "lora_a": spec.restored("lora_a", a.reshape(*w.shape[:n_in], rank)),
        "lora_b": spec.restored("lora_b", b.reshape(*stack, rank, *w.shape[n_in:])),
        "lora_scale": scale,
    }
    if config.init in CHANGES_BASE and spec.kind != "embed":
        # Copies: A and B are donated to the step, their start stays.
        leaves |= {"lora_a0": jnp.copy(leaves["lora_a"]), "lora_b0": jnp.copy(leaves["lora_b"])}
        if config.keep_base or not owns:
            leaves["start_scale"] = scale
        else:
            leaves |= _without_start(leaves | {"kernel": kernel}, spec)
    if config.dora:
        leaves["magnitude"] = column_norm(as_canonical({"kernel": kernel} | leaves, spec))
    return leaves


def _without_start(layer: Layer, spec: LayerSpec | None) -> Layer:
    """The kernel W − s A₀ B₀."""
    layer = as_canonical(layer, spec)
    start = {"lora_a": layer["lora_a0"], "lora_b": layer["lora_b0"], "lora_scale": -layer["lora_scale"]}
    kernel = merged_kernel(start | {"kernel": layer["kernel"]})
    return {"kernel": spec.restored("kernel", kernel) if spec else kernel}


def _start(w: Array, config: AdapterConfig, *, spec: LayerSpec, plan: Plan, key: Array) -> tuple[Array, Array]:
    """A `[L, I, R]` and B `[L, R, O]` of a stack `[L, I, O]`, at full rank."""
    count, rows, columns = w.shape
    rank = int(plan.ranks.max())
    # Experts share a logical path: their order in the stack tells them apart.
    seeds = zip(plan.paths, _repeats(plan.paths), strict=True)
    keys = jnp.stack([jax.random.fold_in(fold_path(key, path), i) for path, i in seeds])
    if config.init == "olora" and spec.kind != "embed":
        return olora(w, rank=rank)
    if config.init == "pissa" and spec.kind != "embed":
        a, b = pissa(w, rank=rank, iterations=config.pissa_iterations, keys=keys)
        root = jnp.sqrt(jnp.maximum(jnp.asarray(plan.scales).reshape(-1, 1, 1), jnp.finfo(jnp.float32).tiny))
        return a / root, b / root
    if spec.kind == "embed":
        return jnp.zeros((count, rows, rank), jnp.float32), jax.vmap(
            lambda k: initial.embedding(k, columns=columns, rank=rank)
        )(keys)
    b = jnp.zeros((count, rank, columns), jnp.float32)
    if config.init == "gaussian":
        own_rank = np.maximum(plan.ranks, 1).reshape(-1, 1, 1)
        return jax.vmap(lambda k: initial.gaussian(k, rows=rows, rank=rank))(keys) / own_rank.astype(np.float32), b
    return jax.vmap(lambda k: initial.kaiming(k, rows=rows, rank=rank))(keys), b


def _repeats(paths: list[str]) -> list[int]:
    seen: dict[str, int] = {}
    counts = []
    for path in paths:
        counts.append(seen.get(path, 0))
        seen[path] = counts[-1] + 1
    return counts
