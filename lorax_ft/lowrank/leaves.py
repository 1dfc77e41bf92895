"""The leaves that one module gets beside its kernel, and the kernel that stands there without their start.

{"kernel": W}  →  {"kernel": W, "lora_a": A, "lora_b": B, "lora_scale": s}
{"kernel": W}  →  {"kernel": W − s A₀ B₀, "lora_a": A, "lora_b": B, "lora_scale": s, "lora_a0": A₀, "lora_b0": B₀}
"""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.linear import Layer, column_norm, merged_kernel
from lorax_ft.lowrank.requantize import Original, Rounded, requantized
from lorax_ft.lowrank.spec import LayerSpec, as_canonical
from lorax_ft.lowrank.starts import Site, Start, start
from lorax_ft.lowrank.svd import Factors, on_host
from lorax_ft.lowrank.targets import Plan
from lorax_ft.quant.kernels import Quantized, matrices

Kernel = Array | Quantized


def adapter_leaves(
    kernel: Kernel,
    config: AdapterConfig,
    *,
    spec: LayerSpec,
    plan: Plan,
    key: Array,
    keeps: bool,
    original: Original | None,
    rounds: int,
    statistic: Array | None,
) -> Layer:
    """The leaves that a module gets, its kernel included where the init changes it.

    Args:
      kernel: W `[*L, *ins, *outs]`, in the order that `spec` says.
      config: the init and its options.
      spec: the meaning of the kernel's axes.
      plan: the ranks and scales of its matrices.
      key: every matrix's randomness is folded from it and the matrix's path.
      keeps: whether W stays where the init would change it.
      original: reads W again, where the kernel is quantized and the init changes it.
      rounds: of decomposition and quantizing.
      statistic: what an init from data starts from, with one stack axis.
    """
    w = spec.canonical("kernel", kernel)
    stack, rows, _ = spec.sizes(kernel.shape)
    keys = _keys(key, plan.paths)
    site = Site(
        w=matrices(w, stack=len(keys), rows=rows),
        rank=plan.width,
        ranks=plan.ranks.reshape(-1),
        scales=plan.scales.reshape(-1),
        keys=keys,
        embed=spec.kind == "embed",
        statistic=statistic,
        rounds=rounds,
    )
    base: Layer = {}
    if original is not None and isinstance(kernel, Quantized):
        kernel_without, begun = _requantized(
            site, config, kernel, original, plan.scales, n_in=len(spec.ins)
        )
        base["kernel"] = kernel_without
    else:
        begun = start(site, config)
    (a, b), taken = begun

    def leaf(name: str, factor: Array) -> Array:
        n_in = len(spec.stack) + len(spec.ins)
        shape = (
            (*w.shape[:n_in], plan.width)
            if name == "lora_a"
            else (*stack, plan.width, *w.shape[n_in:])
        )
        return spec.restored(name, factor.reshape(shape))

    leaves = {
        "lora_a": leaf("lora_a", a),
        "lora_b": leaf("lora_b", b),
        "lora_scale": jnp.asarray(plan.scales),
    }
    if taken is not None:  # copies: A and B are donated to the step, their start stays
        leaves |= {
            "lora_a0": jnp.copy(leaf("lora_a", taken[0])),
            "lora_b0": jnp.copy(leaf("lora_b", taken[1])),
        }
        if keeps:
            leaves["start_scale"] = jnp.asarray(plan.scales)
        elif not base:
            base = without_start(leaves | {"kernel": kernel}, spec, None)
    if config.dora:
        leaves["magnitude"] = column_norm(as_canonical({"kernel": kernel} | base | leaves, spec))
    return base | leaves


def without_start(layer: Layer, spec: LayerSpec | None, original: Original | None) -> Layer:
    """The kernel W − s A₀ B₀; of a quantized one, that of the original quantized anew."""
    layer = as_canonical(layer, spec)
    if isinstance(layer["kernel"], Quantized):
        assert original is not None
        scales = np.asarray(layer["lora_scale"])
        # Whole: the product of split factors rounds otherwise than the one that was first taken out.
        a, b = (jnp.asarray(on_host(layer[name])) for name in ("lora_a0", "lora_b0"))
        n_in, rank = a.ndim - scales.ndim - 1, a.shape[-1]
        a, b = a.reshape(scales.size, -1, rank), b.reshape(scales.size, rank, -1)
        quantized = requantized(
            layer["kernel"], original, lambda w, i, rounded: (a[i], b[i]), scales, n_in=n_in
        )
        return {"kernel": quantized}
    start = {
        "lora_a": layer["lora_a0"],
        "lora_b": layer["lora_b0"],
        "lora_scale": -layer["lora_scale"],
    }
    kernel = merged_kernel(start | {"kernel": layer["kernel"]})
    return {"kernel": spec.restored("kernel", kernel) if spec else kernel}


def fold_path(key: Array, path: str) -> Array:
    """A key for the leaf or module at `path`."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _requantized(
    site: Site,
    config: AdapterConfig,
    kernel: Quantized,
    original: Original,
    scales: np.ndarray,
    *,
    n_in: int,
) -> tuple[Quantized, Start]:
    """The kernel q(W − s A₀ B₀) and where its adapters start, a matrix at a time."""
    begun: list[Start] = []

    def start_of(w: Array, i: slice, rounded: Rounded) -> Factors:
        one = None if site.statistic is None else site.statistic[i]
        begun.append(
            start(
                dataclasses.replace(
                    site,
                    w=w,
                    ranks=site.ranks[i],
                    scales=site.scales[i],
                    keys=site.keys[i],
                    statistic=one,
                    rounded=rounded,
                ),
                config,
            )
        )
        taken = begun[-1].taken
        assert taken is not None
        return taken

    without = requantized(kernel, original, start_of, scales, n_in=n_in)
    return without, jax.tree.map(lambda *parts: jnp.concatenate(parts), *begun)


def _keys(key: Array, paths: list[str]) -> Array:
    """A key for each matrix, by its path; of experts, which share one, by their order in the stack too."""
    seen: dict[str, int] = {}
    keys = []
    for path in paths:
        keys.append(jax.random.fold_in(fold_path(key, path), seen.get(path, 0)))
        seen[path] = seen.get(path, 0) + 1
    return jnp.stack(keys)
