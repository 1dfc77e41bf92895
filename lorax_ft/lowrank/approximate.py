"""Any adapter as plain LoRA: the truncated SVD of what it changes, ΔW ≈ A B.

{"up_proj": {"kernel": W, "miss": D}}  →  {"up_proj": {"kernel": W, "lora_a": A, "lora_b": B, ...}}

Letters: L matrices of the stack, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.svd import at_once, svd
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.lowrank.terms import is_adapted, low_rank
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.tree import Layer, Tree, join, modules, unflatten

ITERATIONS = 16
"""Power iterations of the randomized SVD, whose error is then that of the exact one."""


class Approximation(NamedTuple):
    """Plain LoRA in place of other adapters."""

    params: Tree
    """The base with A, B and their scale beside each kernel that differed. Other leaves that
    differed, such as those of norms and embeddings, are as they were trained."""
    errors: dict[str, float]
    """By module path: ‖ΔW − A B‖ / ‖ΔW‖ in the Frobenius norm, over the matrices of a stack."""


def as_lora(params: Tree, base: Tree, *, layout: Layout, rank: int) -> Approximation:
    """The best plain LoRA of a rank: the largest singular triples of each ΔW = W' − W.

    W' is the merged kernel, so every method, their combinations and kernels that were trained in
    full have this form. No other A B of this rank is nearer to ΔW (Eckart and Young, 1936).

    Args:
      params: a tree with adapters, or one that was trained in full.
      base: the parameters that it was trained from.
      layout: the layers of the model.
      rank: R; a matrix with a shorter side has that one.

    Raises:
      ValueError: the rank is not positive, or no kernel differs from the base's.
    """
    if rank < 1:
        raise ValueError(f"the rank of the approximation is {rank}; it must be above 0")
    trained, originals = modules(params), modules(base)
    leaves: dict[str, Any] = {}
    errors = {}
    # One module at a time is held in float32.
    for key, merged in merged_leaves(params, layout=layout, dtype=jnp.float32):
        path, _, name = key.rpartition("/")
        original = originals.get(path, {}).get(name)
        if original is None:
            leaves[key] = merged
            continue
        own = trained[path]
        if own[name] is original and not is_adapted(own):
            leaves[key] = original
            continue
        spec = layout.get(path)
        # An embedding's rows are looked up, not multiplied.
        if spec is None or name != spec.weight or spec.module == "embed":
            leaves[key] = merged.astype(original.dtype)
            continue
        leaves[key] = original
        factors, error = _factors(merged, original, spec, rank)
        if error is not None:
            leaves |= {join(path, factor): leaf for factor, leaf in factors.items()}
            errors[path] = error
    if not errors:
        raise ValueError("no kernel differs from the base's, so there is nothing to approximate")
    return Approximation(unflatten(leaves), errors)


def _factors(
    merged: Array,
    original: Array | Quantized,
    spec: LayerSpec,
    rank: int,
) -> tuple[Layer, float | None]:
    """A, B and their scale for a stack of kernels, and the relative error; None: they are equal."""
    _, rows, columns = spec.sizes(merged.shape)
    after = spec.canonical(spec.weight, merged).reshape(-1, rows, columns)
    before = dense(spec.canonical(spec.weight, original), jnp.float32)
    change = after.astype(jnp.float32) - before.reshape(after.shape)
    rank = min(rank, rows, columns)
    keys = jax.random.split(jax.random.key(0), len(change))
    count = at_once(rows, columns)
    parts = []
    for first in range(0, len(change), count):
        part = slice(first, first + count)
        parts.append(svd(change[part], rank=rank, iterations=ITERATIONS, keys=keys[part]))
    a = jnp.concatenate([part[0] for part in parts])  # [L, I, R]
    b = jnp.concatenate([part[1] for part in parts])  # [L, R, O]
    norm = float(jnp.linalg.norm(change))
    rest = float(jnp.linalg.norm(change - highest_matmul(a, b)))
    # A scale of 0 says that a matrix has no adapter.
    scale = jnp.any(change != 0, axis=(1, 2)).astype(jnp.float32)  # [L]
    canonical = tuple(merged.shape[axis] for axis in spec.stack + spec.ins + spec.outs)
    leaves = {low_rank.A: a, low_rank.B: b, low_rank.SCALE: scale}
    factors = {}
    for name, leaf in leaves.items():
        shape = spec.canonical_shape(name, canonical, sizes={"rank": rank})
        factors[name] = spec.restored(name, leaf.reshape(shape))
    return factors, rest / norm if norm else None
