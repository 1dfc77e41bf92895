"""SHiRA (2406.13175): a few elements of W train, at random places that are fixed from the start.

    y = x W + x̃ S,    S sparse with r (I + O) elements, as many as LoRA of rank r has

S has a high rank, and merging changes 1 to 2 % of the weights, so that several adapters hardly
meet. S is formed as a whole matrix, for one layer at a time, and computed again in the backward
pass, which forms the whole gradient of W, of which r (I + O) elements are used. Letters: I inputs,
O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.keys import drawn
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.term import Term, check_single_matrix
from lorax_ft.schema import Axis
from lorax_ft.tree import Layer, Shape

VALUE, ROW, COLUMN, RANK = "shira_value", "shira_row", "shira_column", "shira_rank"


def planned(plan: Plan) -> tuple[str, ...]:
    """The elements and their places, where the method is SHiRA.

    Raises:
      ValueError: the module is an embedding or an expert, or has fewer than r (I + O) elements.
    """
    if plan.config.method != "shira":
        return ()
    check_single_matrix(plan)
    elements = plan.rows * plan.columns
    wanted = plan.width * (plan.rows + plan.columns)
    if wanted > elements:
        raise ValueError(
            f"{plan.paths[0]}: SHiRA of rank {plan.width} trains {wanted:,} elements, and its "
            f"matrix of {plan.rows} × {plan.columns} has {elements:,}; lower adapter.rank"
        )
    return (VALUE, ROW, COLUMN, RANK)


def own_sizes(plan: Plan) -> dict[Axis, int]:
    """The number of elements."""
    return {"entry": plan.width * (plan.rows + plan.columns)}


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """S = 0 at random places, one in each of r (I + O) equal parts of the matrix."""
    if RANK not in shapes:
        return {}
    count = shapes[VALUE][-1]
    # On the host, as the products overflow int32.
    bounds = np.arange(count + 1) * (plan.rows * plan.columns) // count
    first = jnp.asarray(bounds[:-1], jnp.int32)
    end = jnp.asarray(bounds[1:], jnp.int32)

    def sample(key: Array) -> Array:
        return jax.random.randint(key, (count,), first, end)

    place = drawn(key, plan.paths, VALUE, sample)
    return {
        VALUE: jnp.zeros(shapes[VALUE], jnp.float32),
        ROW: (place // plan.columns).reshape(shapes[ROW]),
        COLUMN: (place % plan.columns).reshape(shapes[COLUMN]),
        RANK: jnp.asarray(plan.ranks, jnp.float32),
    }


def update(layer: Layer, w: Array) -> Array:
    """S."""
    value = active_value(layer).astype(w.dtype)
    return scattered(value, layer[ROW], layer[COLUMN], shape=w.shape)


def active_value(layer: Layer) -> Array:
    """The elements, 0 in matrices of a stack that are not adapted, which then have no gradient."""
    value = layer[VALUE]
    rank = low_rank.expanded_to(layer[RANK], value.ndim)
    return jnp.where(rank > 0, value, 0)


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    own_ranks = np.asarray(layer[RANK])
    return own_ranks.reshape(-1).astype(int)


def scattered(value: Array, row: Array, column: Array, *, shape: Shape) -> Array:
    """S `[*E, I, O]` of its elements `[*E, entries]`; those of padding have the value 0."""
    *stack, rows, columns = shape
    count = value.shape[-1]

    def one(value: Array, row: Array, column: Array) -> Array:
        return jnp.zeros((rows, columns), value.dtype).at[row, column].add(value)

    flat = [leaf.reshape(-1, count) for leaf in (value, row, column)]
    return jax.vmap(one)(*flat).reshape(*stack, rows, columns)


TERM = Term(
    leaves=(VALUE, ROW, COLUMN, RANK),
    active=RANK,
    negated=(VALUE,),
    takes_dropout=True,
    planned=planned,
    sizes=own_sizes,
    initial=initial,
    update=update,
    ranks=ranks,
)
