"""The layer's own bias: y + b. LoRA and DoRA act before it, IA3 after it."""

from __future__ import annotations

from jax import Array

from lorax_ft.lowrank.spec import BIAS
from lorax_ft.lowrank.terms.term import Product, Term
from lorax_ft.tree import Layer


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + b."""
    return y + product.leaf(layer[BIAS]).astype(y.dtype)


TERM = Term(leaves=(BIAS,), after=after)
