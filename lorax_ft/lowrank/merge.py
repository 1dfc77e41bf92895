"""Merging adapters into their kernels, one or a weighted sum of several, and unmerging them.

{"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}}
→  {"up_proj": {"kernel": W + s A B}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.activation import INVOCATION
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.linear import merged_layer
from lorax_ft.lowrank.shared import shared_leaves, with_shared
from lorax_ft.lowrank.spec import BIAS, LayerSpec, as_canonical, base_kernel
from lorax_ft.lowrank.terms import check_layer, is_adapted, terms_of, tokens
from lorax_ft.mesh_axes import with_auto_axes
from lorax_ft.program import command, either
from lorax_ft.quant.kernels import dense
from lorax_ft.schema import is_base
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Layer, Tree, flatten, from_modules, join, modules, unflatten


def merge_adapters(params: Tree, *, layout: Layout) -> Tree:
    """The base model's tree again, with the adapters folded in, such as W + s A B as each kernel.

    Args:
      params: a tree with adapters.
      layout: the layers of the model.

    A tied output head whose adapter, or whose embedding's adapter, makes the two differ is untied:
    the result then has a kernel of its own there. PEFT 0.21's merge_and_unload leaves the two
    tied, and its logits are off by up to 30 (docs/PEFT.md).

    Raises:
      ValueError: factors do not fit their kernel, or leaves that belong together are missing.
    """

    def merged(params: Tree) -> Tree:
        flat = dict(merged_leaves(params, layout=layout))
        return unflatten(flat)

    return cast(Tree, with_auto_axes(merged, params, keep=params))


def merged_leaves(
    params: Tree,
    *,
    layout: Layout,
    dtype: Any = None,
) -> Iterator[tuple[str, Array]]:
    """The leaves of `merge_adapters` by slash path, merged one module at a time to save memory.

    Args:
      params: a tree with adapters.
      layout: the layers of the model.
      dtype: of the merged leaves; None: their own.
    """
    check_mergeable(params)
    shared = shared_leaves(params)
    for path, layer in _untied(params, layout).items():
        check_layer(layer, path)
        merged = layer
        if is_adapted(layer):
            merged = layer | _merged(layer, layout[path], dtype, shared)
        for name in layer:
            if is_base(name):
                yield join(path, name), dense(merged[name])


def check_mergeable(params: Tree) -> None:
    """Check that kernels can take all that the parameters hold.

    Raises:
      ValueError: a soft prompt, an activated LoRA or a bottleneck, which no kernel can.
    """
    if virtual_tokens(params):
        raise ValueError(
            "a soft prompt cannot be merged: it stands before the tokens, and in no weight; "
            f"{_as_adapter()}"
        )
    if INVOCATION in params:
        raise ValueError(
            "an activated LoRA (adapter.invocation) cannot be merged: a merged kernel acts in all "
            f"tokens, also before the invocation; {_as_adapter()}"
        )
    for path, layer in modules(params).items():
        if any(term.merge is None for term in terms_of(layer)):
            raise ValueError(
                f"{path}: a bottleneck adapter cannot be merged: it is a network behind or beside "
                f"the layer or module, and no change of a kernel; {_bottleneck_instead()}"
            )


def _as_adapter() -> str:
    """How to write what cannot be merged."""
    return either(
        "save_peft writes it as an adapter",
        f"{command('export')} --target peft writes it as an adapter",
    )


def _bottleneck_instead() -> str:
    """What can be done with a bottleneck, which no other program has, PEFT neither."""
    another = "another method, such as lora"
    return either(
        f"save_peft or save_adapter writes it for lorax_ft alone; train {another}, to merge",
        f"{command('generate')} and {command('chat')} run it as it is; train {another}, to export",
    )


def merge_weighted(
    base: Tree,
    adapted: Sequence[Tree],
    weights: Sequence[float],
    *,
    layout: Layout,
) -> Tree:
    """W + Σ w (merged − W): several adapters of one base in one tree, each scaled by its weight.

    Args:
      base: the parameters that all the adapters are for.
      adapted: trees with adapters on that base.
      weights: one for each tree.
      layout: the layers of the model.

    Raises:
      ValueError: there are not as many weights as trees, or none.
    """
    if not adapted or len(adapted) != len(weights):
        raise ValueError(
            f"{len(adapted)} adapters and {len(weights)} weights; give one weight for each adapter"
        )
    untied = _untied(base, layout, also=adapted)
    flat = flatten(from_modules(untied))
    change: dict[str, Array] = {}
    for params, weight in zip(adapted, weights, strict=True):
        for path, leaf in _with_heads(params, untied, layout):
            old = flat[path]
            # The same array: no adapter changed it.
            if leaf is old:
                continue
            difference = leaf.astype(jnp.float32) - dense(old, jnp.float32)
            change[path] = change.get(path, 0) + weight * difference
    merged = {}
    for path, leaf in flat.items():
        if path in change:
            # Rounded once, after all adapters were added.
            changed = dense(leaf, jnp.float32) + change[path]
            leaf = changed.astype(leaf.dtype)
        merged[path] = leaf
    return unflatten(merged)


def unmerge_adapters(merged: Tree, params: Tree, *, layout: Layout) -> Tree:
    """The tree that `params` were merged from: W = M − s A B (+ s₀ A₀ B₀), up to M's rounding.

    Args:
      merged: what `merge_adapters` gave.
      params: a tree with the adapters; its kernels are not used.
      layout: the layers of the model.

    Raises:
      ValueError: an adapter multiplies W (DoRA, IA3, HiRA, OFT) or replaces parts of it (trainable
        tokens), or an embedding or a tied head is adapted: W cannot be computed from the merged
        weights.
    """
    layers = modules(merged)
    shared = shared_leaves(params)
    for path, layer in modules(params).items():
        if not is_adapted(layer):
            continue
        terms = terms_of(layer)
        is_lost = any(term.loses_base for term in terms)
        if "kernel" not in layer or is_lost:
            raise ValueError(
                f"{path}: the base cannot be recovered from the merged weights of DoRA, IA3, HiRA, "
                "OFT, trainable tokens, an embedding or a tied head"
            )
        # Merging the negative of what was added takes it away.
        inverse = layer | {"kernel": layers[path]["kernel"]}
        for term in terms:
            for name in term.negated:
                if name in layer:
                    inverse[name] = -layer[name]
        restored = _merged(inverse, layout[path], None, shared)
        layers[path] = layers[path] | {"kernel": restored["kernel"]}
    return from_modules(layers)


def _merged(layer: Layer, spec: LayerSpec, dtype: Any, shared: Layer) -> Layer:
    """The layer's own matrix and bias with its adapter in them, in their own order of axes."""
    kernel_shape = layer[spec.weight].shape
    canonical = with_shared(as_canonical(layer, spec), shared, spec, kernel_shape)
    if dtype is not None:
        canonical["kernel"] = dense(canonical["kernel"], dtype)
        if BIAS in canonical:
            canonical[BIAS] = canonical[BIAS].astype(dtype)
    merged = merged_layer(canonical, n_out=len(spec.outs))
    restored = {}
    for name, leaf in merged.items():
        restored[name] = spec.restored(name, leaf)
    # The canonical layer calls an embedding's table "kernel" too.
    restored[spec.weight] = restored.pop("kernel")
    return restored


def _untied(params: Tree, layout: Layout, *, also: Sequence[Tree] = ()) -> dict[str, Layer]:
    """The modules, with a kernel of its own for a tied head that an adapter makes differ.

    Args:
      params: the tree.
      layout: the layers of the model.
      also: trees whose adapters, or own kernels of heads, count as well.
    """
    layers = modules(params)
    trees = [layers]
    for tree in also:
        trees.append(modules(tree))
    for path, spec in layout.items():
        layer = layers.get(path, {})
        if spec.tied_to is None or spec.weight in layer:
            continue
        if any(_differs_from_table(tree, path, spec) for tree in trees):
            # A copy of the table, to which the head's adapter is then added.
            kernel = base_kernel(layers, path, spec)
            layers[path] = layer | {spec.weight: kernel}
    return layers


def _differs_from_table(layers: Mapping[str, Layer], path: str, spec: LayerSpec) -> bool:
    """Whether the merged kernel of a tied head is another than the merged table."""
    assert spec.tied_to is not None
    head = layers.get(path, {})
    table = layers.get(spec.tied_to, {})
    # Rows of trainable tokens are the head's columns, too.
    table_differs = is_adapted(table) and tokens.ROWS not in table
    return is_adapted(head) or table_differs or spec.weight in head


def _with_heads(
    params: Tree,
    base: dict[str, Layer],
    layout: Layout,
) -> Iterator[tuple[str, Array]]:
    """The merged leaves in float32, with a kernel for each head that is untied in `base`.

    A head that is still tied in `params` changes as its table does.
    """
    # In float32, so that differences from the base are not rounded to bfloat16 first.
    merged = dict(merged_leaves(params, layout=layout, dtype=jnp.float32))
    for path, spec in layout.items():
        own = join(path, spec.weight)
        base_layer = base.get(path, {})
        untied_in_base = spec.tied_to is not None and spec.weight in base_layer
        if untied_in_base and own not in merged:
            layers = modules(unflatten(merged))
            kernel = base_kernel(layers, path, spec)
            merged[own] = dense(kernel)
    yield from merged.items()
