"""The one forward of every method, and the merged kernel beside it: folds over the layer's terms.

A layer is a dict of leaves, which say which terms it has. The rows of
`lorax_ft.schema.LEAVES` list them, the files in `lorax_ft.lowrank.terms` say what they do:

    kernel | embedding  [*L, in, out]   W, the base weight: an array, or a quantized leaf
    bias                [*L, out]       b
    lora_a, lora_b      [*L, in, r], [*L, r, out]   A and B
    lora_scale          [*L]            s
    ...

`*L` are the leading axes of a stack, absent inside a scan; in and out may be several axes each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.experts import Grouped
from lorax_ft.lowrank.matrices import matrices_of, over_stack
from lorax_ft.lowrank.terms import dropout, magnitude, terms_of
from lorax_ft.lowrank.terms.term import Dot, Product, Term
from lorax_ft.quant.kernels import dense
from lorax_ft.tree import Layer, Shape


def linear(
    layer: Layer,
    x: Array,
    dot: Dot,
    *,
    precision: lax.PrecisionLike = None,
    in_shape: Shape | None = None,
    out_shape: Shape | None = None,
    weights: Callable[[Any], Array] = dense,
    grouped: Grouped | None = None,
) -> Array:
    """y = l ⊙ (b + (m / n) · (x W + s · x̃ A B)), with the terms whose leaves the layer has.

    Args:
      layer: the layer's leaves, without the stack axes of scans.
      x: the layer's input.
      dot: `dot(x, k)`, the layer's product with any kernel that has W's in axes: W itself, A or A₀.
      precision: of the product with B, as the layer has it.
      in_shape: the sizes of W's in axes; None: W is `[in, out]` with one axis for each.
      out_shape: those of its out axes; None: likewise.
      weights: W of the layer's kernel as an array with one out axis, which `dot` takes.
      grouped: the experts of the rows of x, where these are sorted by expert.

    Returns:
      The output, in the dtype of `dot(x, W)`.

    Raises:
      ValueError: leaves that belong together are not all there, such as a magnitude without its
        norm (`with_norms` computes it).

    Source: `lorax_ft.lowrank.terms` has the papers, a file for each term.
    """
    if in_shape is None:
        in_shape = layer["kernel"].shape[:1]
    if out_shape is None:
        out_shape = layer["kernel"].shape[1:]
    product = Product(dot, in_shape, out_shape, precision, grouped, weights)
    terms = terms_of(layer)
    for term in terms:
        x = term.before(layer, x)
    y = _base_product(layer, x, product, terms)
    for term in terms:
        y = term.after(layer, x, y, product)
    return y


def _base_product(layer: Layer, x: Array, product: Product, terms: list[Term]) -> Array:
    """x W + x̃ ΔW, with the ΔW of a term that forms it as a whole."""
    updates = [term.update for term in terms if term.update is not None]
    if not updates:
        return product.dot(x, layer["kernel"])
    (update,) = updates
    dtype = jax.eval_shape(lambda: product.dot(x, layer["kernel"])).dtype
    # 16 bits would lose small changes in W + ΔW, and dropout acts on the input of ΔW alone.
    in_one_product = jnp.finfo(dtype).bits > 16 and dropout.KEY not in layer

    def changed(layer: Layer, x: Array) -> Array:
        w = product.weights(layer["kernel"]).astype(dtype)  # [*E, *in, O]
        n_stack = w.ndim - 1 - len(product.in_shape)
        matrices = w.reshape(*w.shape[:n_stack], -1, w.shape[-1])
        delta = update(layer, matrices)
        kernel = matrices + delta if in_one_product else delta
        return product.dot(x, kernel.reshape(w.shape))

    # Without this the changes of all layers would be kept for the backward pass.
    y = jax.checkpoint(changed)(layer, dropout.dropped(layer, x))
    y = y.reshape(*y.shape[:-1], *product.out_shape).astype(dtype)
    return y if in_one_product else product.dot(x, layer["kernel"]) + y


def merged_kernel(layer: Layer) -> Array:
    """The kernel with the layer's terms folded into it, such as (W + s A B) · m / n.

    Args:
      layer: the layer's leaves, with or without stack axes; axes in the order stack, in, out.

    Returns:
      An array of W's shape and dtype, computed in float32 at the highest precision.

    Raises:
      ValueError: leaves do not fit the kernel, or some that belong together are missing.
    """
    return merged_layer(layer)["kernel"]


def merged_layer(layer: Layer, *, n_out: int | None = None) -> Layer:
    """The kernel, and the bias if there is one, with the layer's terms folded into them.

    `n_out` is how many of the kernel's axes are of the output; None: as its leaves say, or one.
    """
    base = {name: leaf for name, leaf in layer.items() if name in ("kernel", "bias")}
    terms = tuple(term for term in terms_of(layer) if term.changes_kernel)
    for term in terms:
        if term.merge is None:
            raise ValueError(
                f"the leaf {term.leaves[0]!r} belongs to an adapter that is no change of a kernel, "
                "such as a bottleneck, so it cannot be merged; use it as an adapter"
            )
    if not terms:
        return base | {"kernel": dense(layer["kernel"])}
    layer = magnitude.with_norm(layer)
    names = set(base)
    for term in terms:
        names.update(term.all_leaves + term.shared)
    leaves = {name: leaf for name, leaf in layer.items() if name in names}
    matrices = matrices_of(leaves, n_out=n_out)
    merged = over_stack(_merge_matrix, matrices, options=(terms,))
    result = {}
    for name, leaf in base.items():
        reshaped = merged[name].reshape(leaf.shape)
        result[name] = reshaped.astype(leaf.dtype)
    return result


def _merge_matrix(layer: Layer, terms: tuple[Term, ...]) -> Layer:
    """Kernel `[I, O]` and bias `[O]` of one matrix with its terms, in the base's dtypes."""
    base = {"kernel": dense(layer["kernel"], jnp.float32)}
    if "bias" in layer:
        base["bias"] = layer["bias"].astype(jnp.float32)
    for term in terms:
        if term.update is not None:
            base["kernel"] += term.update(layer, base["kernel"])
        assert term.merge is not None
        base = term.merge(layer, base)
    # Cast here, while only one matrix is held in float32.
    merged = {}
    for name, leaf in base.items():
        merged[name] = leaf.astype(layer[name].dtype)
    return merged


__all__ = ["Dot", "Layer", "Product", "linear", "merged_kernel", "merged_layer"]
