"""The one forward of every method, and the merged kernel beside it.

A layer is a dict of leaves; which leaves stand there says which method it is:

    kernel | embedding  [*L, in, out]   W, the base weight: an array, or a quantized leaf (`lorax_ft.quant`)
    bias                [*L, out]       b
    lora_a, lora_b      [*L, in, r], [*L, r, out]   A and B
    lora_scale          [*L]            s
    lora_a0, lora_b0    as A and B      A₀ and B₀: the start of an init that changes the base
    start_scale         [*L]            s, where the base was kept whole and the forward subtracts s A₀ B₀
    magnitude, norm     [*L, out]       DoRA's m and n
    dropout_key, dropout_rate  [*L]     in a training step only

`*L` are the leading axes of a stack, absent inside a scan; in and out may be several axes each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.quant.kernels import dense, matrices

Layer = dict[str, Any]
Dot = Callable[[Array, Array], Array]

ADAPTER_LEAVES = frozenset(
    {"lora_a", "lora_b", "lora_scale", "lora_a0", "lora_b0", "start_scale", "magnitude"}
)
STEP_LEAVES = frozenset({"norm", "dropout_key", "dropout_rate"})
NORM_BLOCK = 2**22  # elements of W + s A B that the norm holds at once


def linear(layer: Layer, x: Array, dot: Dot, *, precision: lax.PrecisionLike = None) -> Array:
    """y = b + g · (x W + s · x̃ A B), where g = m / n for DoRA and 1 otherwise.

    With dropout and a magnitude, y = b + x W + (g − 1) · x̃ W + g s · x̃ A B, as PEFT has it.

    Args:
      layer: the layer's leaves, without stack axes.
      x: the layer's input.
      dot: `dot(x, k)`, the layer's product with any kernel of W's in axes: W itself, A or A₀.
      precision: of the product with B, as the layer has it.

    Returns:
      The output, in the dtype of `dot(x, W)`.

    Raises:
      ValueError: a magnitude stands without its norm (`with_norms` computes it).

    Source: LoRA (2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948).
    """
    if "magnitude" in layer and "norm" not in layer:
        raise ValueError(
            "this layer has a DoRA magnitude without its norm; call lorax_ft.with_norms(params) first"
        )

    def base(x: Array) -> Array:  # x W, less the start where the base was kept
        y = dot(x, layer["kernel"])
        return (
            y - low_rank(x, ("lora_a0", "lora_b0", "start_scale"), y.dtype)
            if "start_scale" in layer
            else y
        )

    def low_rank(x: Array, names: tuple[str, str, str], dtype: jnp.dtype) -> Array:
        a, b, s = (layer[name] for name in names)
        b = (s.reshape(s.shape + (1,) * (b.ndim - s.ndim)) * b).astype(dtype)
        return _expand(
            dot(x, a.astype(dtype)).astype(dtype), b, n_stack=s.ndim, precision=precision
        )

    y = base(x)
    dtype = y.dtype
    if "lora_a" in layer:
        dropped = _dropout(layer, x)
        change = low_rank(dropped, ("lora_a", "lora_b", "lora_scale"), dtype)
        if "magnitude" not in layer:
            y = y + change
        elif dropped is x:
            y = (gain(layer) * (y + change).astype(jnp.float32)).astype(dtype)
        else:
            g = gain(layer)
            y, again, change = (part.astype(jnp.float32) for part in (y, base(dropped), change))
            y = (y + (g - 1) * again + g * change).astype(dtype)
    return y + layer["bias"].astype(y.dtype) if "bias" in layer else y


def merged_kernel(layer: Layer) -> Array:
    """(W − s₀ A₀ B₀ + s A B) · m / n, an array of W's shape and dtype, computed in float32 at the highest precision.

    Args:
      layer: the layer's leaves, with or without stack axes; the kernel's axes in the order stack, in, out.

    Raises:
      ValueError: the factors do not fit the kernel.
    """
    w = layer["kernel"]
    if "lora_a" not in layer:
        return dense(w)
    flat = _matrices(layer)
    if "magnitude" in layer:
        g = gain(layer | {"norm": layer["norm"] if "norm" in layer else column_norm(layer)})
        flat["gain"] = g.reshape(len(flat["lora_scale"]), -1)
    return _over_stack(_merge_matrix, flat, w.dtype).reshape(w.shape)


def gain(layer: Layer) -> Array:
    """DoRA's m / n in float32: 0 where n = 0, and 1 in a layer of a stack that is not adapted (s = 0)."""
    m, n, s = layer["magnitude"], layer["norm"], layer["lora_scale"]
    adapted = s.reshape(s.shape + (1,) * (m.ndim - s.ndim)) != 0
    return jnp.where(adapted, jnp.where(n > 0, m / jnp.where(n > 0, n, 1), 0), 1)


def column_norm(layer: Layer) -> Array:
    """n = ‖W + s A B‖ over the in axes, `[*L, out]` in float32, a constant for the gradient.

    A matrix of the stack is taken at a time, and of a large matrix every k-th row, so that no
    full-size temporary exists and a sharded axis stays sharded.
    """
    n_stack = layer["lora_scale"].ndim
    out_shape = layer["lora_b"].shape[n_stack + 1 :]
    norms = _over_stack(
        _norm_matrix, _matrices(jax.tree.map(lax.stop_gradient, layer)), jnp.float32
    )
    return norms.reshape(*layer["lora_scale"].shape, *out_shape)


def _expand(z: Array, b: Array, *, n_stack: int, precision: lax.PrecisionLike) -> Array:
    """z B: the rank in z's last axis becomes B's out axes. Stack axes inside a layer count experts: `[..., E, r]`."""
    out = b.shape[n_stack + 1 :]
    if n_stack:
        flat = b.reshape(math.prod(b.shape[:n_stack]), b.shape[n_stack], -1)
        y = jnp.einsum("zer,ero->zeo", z.reshape(-1, *flat.shape[:2]), flat, precision=precision)
    else:
        y = jnp.matmul(z.reshape(-1, z.shape[-1]), b.reshape(b.shape[0], -1), precision=precision)
    return y.reshape(*z.shape[:-1], *out)


def _dropout(layer: Layer, x: Array) -> Array:
    """x̃: the input of the adapter branch; x itself where there is nothing to drop."""
    if "dropout_key" not in layer or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    key, rate = (
        layer[name].reshape(-1)[0] for name in ("dropout_key", "dropout_rate")
    )  # experts share x
    keep = 1 - rate  # in float32, as bfloat16 has no 0.99
    scaled = (x.astype(jnp.float32) / keep).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), scaled, 0)


def _matrices(layer: Layer) -> Layer:
    """The leaves of W + s A B as matrices with one stack axis: `[L, I, O]`, `[L, I, R]`, `[L, R, O]`, `[L]`."""
    w, a, b, s = (layer[name] for name in ("kernel", "lora_a", "lora_b", "lora_scale"))
    n = s.ndim
    n_in = a.ndim - n - 1
    if w.shape[: n + n_in] != a.shape[:-1] or w.shape[n + n_in :] != b.shape[n + 1 :]:
        raise ValueError(
            f"A {a.shape} and B {b.shape} do not fit a kernel {w.shape} of axes stack, in, out; "
            "pass layout= (see lorax_ft.layout) for kernels with another order of axes"
        )
    stack, rank = math.prod(s.shape), a.shape[-1]
    rows = math.prod(a.shape[n:-1])
    flat = {
        "kernel": matrices(w, stack=stack, rows=rows),
        "lora_a": a.reshape(stack, rows, rank),
        "lora_b": b.reshape(stack, rank, -1),
        "lora_scale": s.reshape(stack),
    }
    if "start_scale" in layer:
        flat |= {
            "lora_a0": layer["lora_a0"].reshape(stack, rows, rank),
            "lora_b0": layer["lora_b0"].reshape(stack, rank, -1),
            "start_scale": layer["start_scale"].reshape(stack),
        }
    return flat


@functools.partial(
    jax.jit, static_argnums=(0, 2)
)  # or the loop would be compiled anew at every call outside a jit
def _over_stack(f: Callable[[Layer], Array], layers: Layer, dtype: jnp.dtype) -> Array:
    """f of each matrix of a stack, one at a time."""
    if layers["kernel"].shape[0] == 1:
        return f(jax.tree.map(lambda leaf: leaf[0], layers))[None].astype(dtype)
    return lax.map(lambda layer: f(layer).astype(dtype), layers)


def _merge_matrix(layer: Layer) -> Array:
    """(W + s A B) · m / n of one matrix `[I, O]`, or of some of its rows, in float32."""
    w = dense(layer["kernel"], jnp.float32)
    w = w + layer["lora_scale"] * jnp.matmul(
        layer["lora_a"], layer["lora_b"], precision=lax.Precision.HIGHEST
    )
    if "start_scale" in layer:
        start = jnp.matmul(layer["lora_a0"], layer["lora_b0"], precision=lax.Precision.HIGHEST)
        w = w - layer["start_scale"] * start
    return w * layer["gain"] if "gain" in layer else w


def _norm_matrix(layer: Layer) -> Array:
    """‖W + s A B‖ of one matrix over its rows, `[O]`."""
    layer = layer | {"kernel": dense(layer["kernel"])}
    rows, columns = layer["kernel"].shape
    blocks = next(
        n
        for n in range(1, rows + 1)
        if rows % n == 0 and (rows // n * columns <= NORM_BLOCK or n == rows)
    )

    def block_squares(part: Layer) -> Array:
        return jnp.sum(_merge_matrix(layer | part) ** 2, axis=0)

    by_row: Layer = {
        name: leaf for name, leaf in layer.items() if name in ("kernel", "lora_a", "lora_a0")
    }
    if blocks == 1:
        return jnp.sqrt(block_squares(by_row))
    strided = {k: v.reshape(rows // blocks, blocks, -1) for k, v in by_row.items()}

    def add_block(i: Array, squares: Array) -> Array:
        every_kth = {
            k: lax.dynamic_index_in_dim(v, i, axis=1, keepdims=False) for k, v in strided.items()
        }
        return squares + block_squares(every_kth)

    return jnp.sqrt(lax.fori_loop(0, blocks, add_block, jnp.zeros(columns, jnp.float32)))
