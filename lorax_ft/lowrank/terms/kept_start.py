"""The start of an init that changes the base (PiSSA, 2404.02948, and others): y − s · x A₀ B₀.

    y = x (W − s A₀ B₀) + s · x A B,    A₀ and B₀ as A and B were at the first step

A₀ and B₀ are kept in the tree, so that export, resume and unmerging need no seed. Usually the base
holds W − s A₀ B₀ itself, and this term does nothing. With `keep_base` the base still holds W; the
layer then has the leaf `start_scale`, and the forward subtracts the start.
"""

from __future__ import annotations

from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.term import Product, Term
from lorax_ft.tree import Layer

A0, B0, SCALE = "lora_a0", "lora_b0", "start_scale"


def planned(plan: Plan) -> tuple[str, ...]:
    """A₀ and B₀ where the init changes the base, and s where the base is kept."""
    names = {
        "none": (),
        "in_base": (A0, B0),
        "kept": (A0, B0, SCALE),
    }
    return names[plan.start]


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y − s · x A₀ B₀ where the base was kept."""
    if SCALE not in layer:
        return y
    # x without dropout: the start is part of the base.
    return y - low_rank.low_rank(x, layer[A0], layer[B0], layer[SCALE], y.dtype, product)


def merge(layer: Layer, base: Layer) -> Layer:
    """W − s A₀ B₀ where the base was kept."""
    if SCALE not in layer:
        return base
    start = highest_matmul(layer[A0], layer[B0])
    return base | {"kernel": base["kernel"] - layer[SCALE] * start}


def is_in_base(layer: Layer) -> bool:
    """Whether the layer's kernel is W − s A₀ B₀."""
    return A0 in layer and SCALE not in layer


TERM = Term(
    leaves=(A0, B0),
    optional=(SCALE,),
    negated=(SCALE,),
    needs=(low_rank.A, low_rank.B, low_rank.SCALE),
    planned=planned,
    after=after,
    merge=merge,
)
