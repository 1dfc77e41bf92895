"""The leaves that one module gets beside its kernel, and its kernel without their start.

{"kernel": W}  →  {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}
{"kernel": W}  →  {"kernel": W − s A₀ B₀, "lora_a": A, …, "lora_a0": A₀, "lora_b0": B₀}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.inits import Init, InitResult, initialize, initialize_embedding
from lorax_ft.lowrank.inits.context import InitContext
from lorax_ft.lowrank.inits.svd import Factors, on_host
from lorax_ft.lowrank.keys import matrix_keys
from lorax_ft.lowrank.linear import merged_kernel
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.requantize import Original, Quantize, requantized
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.lowrank.terms import TERMS, kept_start, low_rank, planned_leaves
from lorax_ft.quant.kernels import Quantized, matrices
from lorax_ft.tree import Layer, Shape


def leaf_shapes(plan: Plan, kernel: Shape) -> dict[str, Shape]:
    """The shapes, in canonical order, of the leaves that a module with this plan gets.

    Args:
      plan: the module's.
      kernel: the shape of its kernel.
    """
    names = planned_leaves(plan)
    return {name: plan.spec.leaf_shape(name, kernel, rank=plan.width) for name in names}


def adapter_leaves(
    kernel: Array | Quantized,
    *,
    plan: Plan,
    init: Init,
    key: Array,
    options: Mapping[str, Any],
    statistic: Array | None,
    original: Original | None,
    rounds: int,
) -> Layer:
    """The leaves that a module gets, and its kernel where the init changes it.

    Args:
      kernel: W, in the order of axes that `spec` says.
      plan: the meaning of the kernel's axes, the method, ranks and scales of its matrices.
      init: how A and B start, for LoRA.
      key: every matrix's randomness is folded from it and the matrix's path.
      options: the options that the init uses.
      statistic: what the init needs from data, with one stack axis.
      original: reads W again, where the kernel is quantized and the init changes it.
      rounds: of decomposition and quantization.
    """
    spec = plan.spec
    layer: Layer = {"kernel": spec.canonical("kernel", kernel)}
    if low_rank.planned(plan):
        _, rows, _ = spec.sizes(kernel.shape)
        context = InitContext(
            kernel=matrices(layer["kernel"], stack=len(plan.paths), rows=rows),
            rank=plan.width,
            ranks=plan.ranks.reshape(-1),
            scales=plan.scales.reshape(-1),
            keys=matrix_keys(key, plan.paths),
            options=options,
            statistic=statistic,
            rounds=rounds,
        )
        layer = _with_factors(layer["kernel"], context, init, plan, original)
    shapes = leaf_shapes(plan, kernel.shape)
    for term in TERMS:
        layer |= term.initial(layer, plan, shapes)
    leaves = {name: spec.restored(name, leaf) for name, leaf in layer.items()}
    changed = leaves.pop("kernel")
    if kept_start.is_in_base(layer):
        leaves[spec.weight] = changed
    return leaves


def without_start(
    kernel: Array | Quantized,
    leaves: Layer,
    *,
    spec: LayerSpec,
    original: Original | None,
) -> Array | Quantized:
    """The kernel W − s A₀ B₀ in its own order of axes.

    For a quantized kernel, the original W is read again and requantized without the start.

    Args:
      kernel: W in its own order of axes.
      leaves: the adapter's, in the tree's order of axes.
      spec: the module's layout.
      original: reads W before it was quantized; needed where it is.
    """
    layer = as_canonical(leaves | {"kernel": kernel}, spec)
    if not isinstance(kernel, Quantized):
        return spec.restored("kernel", _minus_start(layer))
    assert original is not None
    scales = np.asarray(layer[low_rank.SCALE])
    # Whole on every host: the product of split factors rounds differently from the one that was
    # subtracted first.
    a = jnp.asarray(on_host(layer[kept_start.A0]))
    b = jnp.asarray(on_host(layer[kept_start.B0]))
    rank = a.shape[-1]
    n_in = a.ndim - scales.ndim - 1
    a = a.reshape(scales.size, -1, rank)
    b = b.reshape(scales.size, rank, -1)

    def start_of(w: Array, i: slice, quantize: Quantize) -> Factors:
        return a[i], b[i]

    return requantized(kernel, original, start_of, scales, n_in=n_in)


def _with_factors(
    kernel: Array | Quantized,
    context: InitContext,
    init: Init,
    plan: Plan,
    original: Original | None,
) -> Layer:
    """The kernel and LoRA's leaves, in canonical order.

    Where the init subtracts a start from the base, the kernel is without it.
    """
    spec = plan.spec
    if spec.module == "embed":
        result = initialize_embedding(context)
    elif original is not None and isinstance(kernel, Quantized):
        result, kernel = _requantized(context, init, kernel, original, plan)
    else:
        result = initialize(init, context)
    leaves = dict(zip(low_rank.FACTORS, result.factors, strict=True))
    if result.removed is not None:
        # Copies, since A and B are donated to the step and their start stays.
        a0, b0 = result.removed
        leaves[kept_start.A0] = jnp.copy(a0)
        leaves[kept_start.B0] = jnp.copy(b0)
    layer: Layer = {}
    for name, leaf in leaves.items():
        shape = spec.canonical_shape(name, kernel.shape, rank=plan.width)
        layer[name] = leaf.reshape(shape)
    layer["kernel"] = kernel
    layer[low_rank.SCALE] = jnp.asarray(plan.scales)
    if result.removed is None:
        return layer
    if plan.start == "kept":
        return layer | {kept_start.SCALE: jnp.asarray(plan.scales)}
    if not isinstance(kernel, Quantized):
        return layer | {"kernel": _minus_start(layer)}
    if original is None:
        raise ValueError(
            f"{plan.paths[0]}: the init subtracts its start from the base, which is quantized; "
            "only the inits of this library can requantize it"
        )
    return layer


def _minus_start(layer: Layer) -> Array:
    """W − s A₀ B₀, in canonical order."""
    negative_start = {
        "kernel": layer["kernel"],
        low_rank.A: layer[kept_start.A0],
        low_rank.B: layer[kept_start.B0],
        low_rank.SCALE: -layer[low_rank.SCALE],
    }
    return merged_kernel(negative_start)


def _requantized(
    context: InitContext,
    init: Init,
    kernel: Quantized,
    original: Original,
    plan: Plan,
) -> tuple[InitResult, Quantized]:
    """Where the adapters start, and the kernel q(W − s A₀ B₀), computed a matrix at a time."""
    results: list[InitResult] = []

    def start_of(w: Array, i: slice, quantize: Quantize) -> Factors:
        statistic = context.statistic
        if statistic is not None:
            statistic = statistic[i]
        one = dataclasses.replace(
            context,
            kernel=w,
            ranks=context.ranks[i],
            scales=context.scales[i],
            keys=context.keys[i],
            statistic=statistic,
            quantize=quantize,
        )
        result = initialize(init, one)
        results.append(result)
        assert result.removed is not None
        return result.removed

    n_in = len(plan.spec.ins)
    changed = requantized(kernel, original, start_of, plan.scales, n_in=n_in)
    result = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
    return result, changed
