"""IA3 (2205.05638): a learned vector scales a layer's output, or the input of a feedforward layer.

    y = l ⊙ (x W + b)      or      y = (l ⊙ x) W + b

As in PEFT, the vector of an output scales the bias too.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.patterns import is_target
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms.low_rank import expanded_to
from lorax_ft.lowrank.terms.term import Product, Term, saved
from lorax_ft.tree import Layer, Shape

INPUT, OUTPUT, ACTIVE = "ia3_in", "ia3_out", "ia3_active"


def planned(plan: Plan) -> tuple[str, ...]:
    """One vector: of the input where the option `feedforward` matches, else of the output.

    Raises:
      ValueError: the module is an embedding, a feedforward module is not a dense layer, or the
        option means some layers of a stack and not others.
    """
    if plan.config.method != "ia3":
        return ()
    if plan.spec.module == "embed":
        raise ValueError(f"{plan.paths[0]}: IA3 is not for embeddings; exclude them")
    adapted = [path for path, rank in zip(plan.paths, plan.ranks.flat, strict=True) if rank]
    scales_input = {is_target(path, plan.spec, plan.config.feedforward) for path in adapted}
    if len(scales_input) > 1:
        raise ValueError(
            f"adapter.feedforward matches some layers of the stack of {adapted[0]} and not others; "
            "a stack scales the input of all its layers or of none"
        )
    if scales_input == {False}:
        return (OUTPUT, ACTIVE)
    if plan.spec.module != "dense":
        raise ValueError(
            f"{plan.paths[0]} is of the type {plan.spec.module}, and adapter.feedforward is for "
            "dense layers only"
        )
    return (INPUT, ACTIVE)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """l = 1, so that the base is unchanged at first."""
    leaves: Layer = {}
    for name in (INPUT, OUTPUT):
        if name in shapes:
            leaves[name] = jnp.ones(shapes[name], jnp.float32)
    if leaves:
        leaves[ACTIVE] = jnp.asarray(plan.ranks > 0, jnp.float32)
    return leaves


def before(layer: Layer, x: Array) -> Array:
    """l ⊙ x."""
    if INPUT not in layer:
        return x
    scaled = vector(layer, INPUT) * x.astype(jnp.float32)
    return scaled.astype(x.dtype)


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """l ⊙ y."""
    if OUTPUT not in layer:
        return y
    l_out = product.leaf(vector(layer, OUTPUT))
    # The gradient of l needs y.
    scaled = l_out * saved(y).astype(jnp.float32)
    return scaled.astype(y.dtype)


def merge(layer: Layer, base: Layer) -> Layer:
    """W with its rows or columns scaled, and b with W's columns."""
    if INPUT in layer:
        l_in = vector(layer, INPUT)
        return base | {"kernel": l_in[:, None] * base["kernel"]}
    l_out = vector(layer, OUTPUT)
    return {name: l_out * leaf for name, leaf in base.items()}


def vector(layer: Layer, name: str) -> Array:
    """l, and 1 in matrices of a stack that are not adapted, which then have no gradient either."""
    l = layer[name]
    active = expanded_to(layer[ACTIVE], l.ndim)
    return jnp.where(active != 0, l, 1)


TERM = Term(
    leaves=(ACTIVE,),
    one_of=(INPUT, OUTPUT),
    active=ACTIVE,
    loses_base=True,
    planned=planned,
    initial=initial,
    before=before,
    after=after,
    merge=merge,
)
