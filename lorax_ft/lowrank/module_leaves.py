"""The leaves that one module gets beside its kernel, and its kernel without their start.

{"kernel": W}  →  {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}
{"kernel": W}  →  {"kernel": W − s A₀ B₀, "lora_a": A, …, "lora_a0": A₀, "lora_b0": B₀}
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.inits.context import InitResult
from lorax_ft.lowrank.inits.svd import on_host
from lorax_ft.lowrank.linear import merged_kernel
from lorax_ft.lowrank.matrices import matrices_of
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.requantize import Original, requantized
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.lowrank.terms import TERMS, kept_start, low_rank, own_sizes, planned_leaves
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Layer, Shape


def leaf_shapes(plan: Plan, kernel: Shape) -> dict[str, Shape]:
    """The shapes, in canonical order, of the leaves that a module with this plan gets.

    Args:
      plan: the module's.
      kernel: the shape of its kernel.
    """
    sizes = own_sizes(plan)
    names = planned_leaves(plan)
    return {name: plan.spec.leaf_shape(name, kernel, sizes=sizes) for name in names}


def adapter_leaves(
    kernel: Array | Quantized | None,
    *,
    plan: Plan,
    start: InitResult | None,
    key: Array,
    original: Original | None = None,
    donate: bool = False,
) -> Layer:
    """The leaves that a module gets, and its kernel where the init changes it.

    Args:
      kernel: W, in the order of axes that `spec` says; None: the module is no layer.
      plan: the meaning of the kernel's axes, the method, ranks and scales of its matrices.
      start: what the init returned for the stack, for LoRA.
      key: every matrix's randomness is folded from it and the matrix's path.
      original: reads W again, where the kernel is quantized and the init changes it.
      donate: whether a kernel that changes is consumed.
    """
    spec = plan.spec
    if kernel is None:
        assert spec.block_shape is not None
        shapes = leaf_shapes(plan, spec.block_shape)
        return _initial({}, plan, shapes, key)
    layer: Layer = {"kernel": spec.canonical("kernel", kernel)}
    if start is not None:
        layer |= _factor_leaves(start, plan, layer["kernel"].shape)
    if kept_start.is_in_base(layer):
        if isinstance(kernel, Quantized) and original is None:
            raise ValueError(
                f"{plan.paths[0]}: the init subtracts its start from the base, which is quantized; "
                "only the inits of this library can requantize it"
            )
        layer["kernel"] = _minus_start(layer, spec, original, donate=donate)
    layer |= _initial(layer, plan, leaf_shapes(plan, kernel.shape), key)
    leaves = {name: spec.restored(name, leaf) for name, leaf in layer.items()}
    changed = leaves.pop("kernel")
    if kept_start.is_in_base(layer):
        leaves[spec.weight] = changed
    return leaves


def _initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """The leaves that no init gives."""
    leaves: Layer = {}
    for term in TERMS:
        leaves |= term.initial(layer | leaves, plan, shapes, key)
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
    return spec.restored("kernel", _minus_start(layer, spec, original))


def _factor_leaves(start: InitResult, plan: Plan, kernel: Shape) -> Layer:
    """LoRA's leaves in canonical order, beside a kernel whose shape is given in that order."""
    start = start.within_ranks(plan.ranks.reshape(-1))
    leaves = dict(zip(low_rank.FACTORS, start.factors, strict=True))
    if start.removed is not None:
        # Copies, since A and B are donated to the step and their start stays.
        a0, b0 = start.removed
        leaves[kept_start.A0] = jnp.copy(a0)
        leaves[kept_start.B0] = jnp.copy(b0)
    layer: Layer = {}
    for name, leaf in leaves.items():
        shape = plan.spec.canonical_shape(name, kernel, sizes={"rank": plan.width})
        layer[name] = leaf.reshape(shape)
    layer[low_rank.SCALE] = jnp.asarray(plan.scales)
    if start.removed is not None and plan.start == "kept":
        layer[kept_start.SCALE] = jnp.asarray(plan.scales)
    return layer


def _minus_start(
    layer: Layer,
    spec: LayerSpec,
    original: Original | None,
    *,
    donate: bool = False,
) -> Array | Quantized:
    """W − s A₀ B₀ of a canonical layer."""
    kernel = layer["kernel"]
    names = ("kernel", kept_start.A0, kept_start.B0, low_rank.SCALE)
    if isinstance(kernel, Quantized):
        assert original is not None
        # Whole on every host: the product of split factors rounds differently from the one that was
        # subtracted first.
        whole = {name: on_host(layer[name]) for name in names[1:]}
        scales = whole[low_rank.SCALE]
        rank = layer[kept_start.A0].shape[-1]
        a = jnp.asarray(whole[kept_start.A0]).reshape(scales.size, -1, rank)
        b = jnp.asarray(whole[kept_start.B0]).reshape(scales.size, rank, -1)
        changed = requantized(kernel, original, (a, b), scales, n_in=len(spec.ins))
    else:
        start = matrices_of({name: layer[name] for name in names})
        subtract = _subtracted_in_place if donate else _subtracted
        changed = subtract(start.pop("kernel"), start).reshape(kernel.shape)
    if donate:
        for part in jax.tree.leaves(kernel):
            part.delete()
    return changed


def _subtract(w: Array, start: Layer) -> Array:
    """W − s A₀ B₀ of matrices `[L, I, O]`, one at a time: only one is held in float32."""

    def step(i: Array, w: Array) -> Array:
        negative_start = {
            "kernel": w[i],
            low_rank.A: start[kept_start.A0][i],
            low_rank.B: start[kept_start.B0][i],
            low_rank.SCALE: -start[low_rank.SCALE][i],
        }
        return w.at[i].set(merged_kernel(negative_start))

    return lax.fori_loop(0, len(w), step, w)


# Jitted, since a loop outside jit would be compiled anew at every call.
_subtracted = jax.jit(_subtract)
_subtracted_in_place = jax.jit(_subtract, donate_argnums=0)
