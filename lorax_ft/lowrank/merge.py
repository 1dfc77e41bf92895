"""Adapters folded into their kernels, several with weights, and taken out again.

{"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}}  →  {"up_proj": {"kernel": W + s A B}}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.adapters import tied_kernel
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES, Layer, merged_kernel
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.quant.kernels import dense
from lorax_ft.tree import Tree, flatten, from_modules, modules, unflatten


def merge_adapters(params: Tree, *, layout: Layout | None = None) -> Tree:
    """The base model's tree again, with W − s₀ A₀ B₀ + s A B, times DoRA's m / n, as each kernel.

    Args:
      params: a tree with adapters.
      layout: the layers of the model; needed where an embedding is adapted, or where a kernel's axes are
        not in the order stack, in, out (some of `nn.Einsum`'s).

    A tied output head whose adapter, or whose embedding's adapter, makes the two differ is untied: the
    result then holds `lm_head/kernel`.

    Raises:
      ValueError: factors do not fit their kernel, or only the layout could tell how to merge.
    """
    return unflatten(dict(merged_leaves(params, layout=layout)))


def merged_leaves(
    params: Tree, *, layout: Layout | None = None, dtype: Any = None
) -> Iterator[tuple[str, Array]]:
    """The leaves of `merge_adapters` by slash path, one at a time, so that not all need to exist at once.

    What is merged has the kernel's own type, or `dtype`.
    """
    for path, layer in modules(_untied(params, layout)).items():
        for name in [name for name in layer if name not in ADAPTER_LEAVES | STEP_LEAVES]:
            if "lora_a" in layer and name in ("kernel", "embedding"):
                cast = layer if dtype is None else layer | {name: dense(layer[name], dtype)}
                leaf = _merged(cast, name, layout[path] if layout else None)
            else:
                leaf = dense(layer[name])
            yield f"{path}/{name}" if path else name, leaf


def merge_weighted(
    base: Tree, adapted: Sequence[Tree], weights: Sequence[float], *, layout: Layout | None = None
) -> Tree:
    """W + Σ w (merged − W): several adapters of one base in one tree, each as strong as its weight.

    Args:
      base: the parameters that all the adapters are for.
      adapted: trees with adapters on that base.
      weights: one for each tree.
      layout: as in `merge_adapters`.

    Raises:
      ValueError: there are not as many weights as trees, or none.
    """
    if not adapted or len(adapted) != len(weights):
        raise ValueError(
            f"{len(adapted)} adapters and {len(weights)} weights; give as many of each, at least one"
        )
    flat = flatten(base)
    table = "embed_tokens/embedding"
    tied = "lm_head/kernel" not in flat and table in flat
    change: dict[str, Array] = {}
    untied = False
    for params, weight in zip(adapted, weights, strict=True):
        merged = merged_leaves(params, layout=layout, dtype=jnp.float32)
        changed = {
            path: leaf for path, leaf in merged if path not in flat or leaf is not flat[path]
        }
        if tied:  # a head that is the table changes as the table does
            untied |= "lm_head/kernel" in changed
            own = changed.get(table, flat[table]).T
            changed["lm_head/kernel"] = changed.get("lm_head/kernel", own)
        for path, leaf in changed.items():
            old = flat[path] if path in flat else tied_kernel(base)
            change[path] = change.get(path, 0) + weight * (
                leaf.astype(jnp.float32) - dense(old, jnp.float32)
            )
    if tied and not untied:
        change.pop("lm_head/kernel")
    kept = flat | ({"lm_head/kernel": tied_kernel(base)} if tied and untied else {})
    return unflatten(
        {
            p: (dense(w, jnp.float32) + change[p]).astype(w.dtype) if p in change else w
            for p, w in kept.items()
        }
    )


def unmerge_adapters(merged: Tree, params: Tree, *, layout: Layout | None = None) -> Tree:
    """The tree that `params` were merged from: W = M − s A B (+ s₀ A₀ B₀), to the rounding of M's dtype.

    Args:
      merged: what `merge_adapters` gave.
      params: a tree with the adapters; its kernels are not used.
      layout: as in `merge_adapters`.

    Raises:
      ValueError: an adapter has a DoRA magnitude, or an embedding is adapted: the merged weights do not tell W.
    """
    layers = modules(merged)
    for path, layer in modules(params).items():
        if "lora_a" not in layer:
            continue
        if "magnitude" in layer or "kernel" not in layer:
            raise ValueError(
                f"{path}: merged weights do not tell the base of a DoRA, an embedding or a tied head"
            )
        turned = {name: -layer[name] for name in ("lora_scale", "start_scale") if name in layer}
        back = layer | turned | {"kernel": layers[path]["kernel"]}
        layers[path] = layers[path] | {
            "kernel": _merged(back, "kernel", layout[path] if layout else None)
        }
    return from_modules(layers)


def _merged(layer: Layer, name: str, spec: LayerSpec | None) -> Array:
    """The layer's kernel or embedding with its adapter in it, its axes in their own order."""
    kernel = merged_kernel(as_canonical(layer, spec))
    return spec.restored(name, kernel) if spec else kernel


def _untied(params: Tree, layout: Layout | None) -> Tree:
    """The tree with a head of its own where an adapter makes a tied head and its embedding differ."""
    flat = flatten(params)
    embeddings = [
        path for path, layer in modules(params).items() if {"embedding", "lora_a"} <= layer.keys()
    ]
    if embeddings and layout is None:
        raise ValueError(
            f"{embeddings[0]} is adapted and may be the output head too: pass layout= to merge it"
        )
    tied = (
        "lm_head/kernel" not in flat
        and layout is not None
        and "lm_head" in layout
        and layout["lm_head"].by_name
    )
    if ("lm_head/lora_a" in flat and "lm_head/kernel" not in flat) or (embeddings and tied):
        flat = flat | {"lm_head/kernel": tied_kernel(params)}
    return unflatten(flat)
