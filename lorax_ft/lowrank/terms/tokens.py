"""Trainable tokens: the rows of a few tokens in the embedding, and their columns in the head.

    embedding:  e_i = E'_j where token i is the j-th trained one, else E_i
    head:       z_i = x U'_j  where token i is the j-th trained one, else x U_i

The other rows stay as they are, and are neither copied nor given a gradient. A head that is tied to
the embedding has the embedding's rows as columns. PEFT calls this `trainable_token_indices`.

Letters: V vocabulary, D width, N trained tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.terms.term import Product, Term
from lorax_ft.tree import Layer

IDS, ACTIVE = "token_ids", "token_active"
ROWS, COLUMNS = "token_rows", "token_columns"


def leaves_of_table(table: Array, ids: Array) -> Layer:
    """The leaves beside an embedding `[V, D]`: rows that start as its own.

    Args:
      table: the embedding.
      ids: the trained tokens, `[N]`, ascending and each once.
    """
    rows = table[ids].astype(jnp.float32)
    return {IDS: ids, ACTIVE: jnp.ones(()), ROWS: rows}


def leaves_of_head(kernel: Array, ids: Array) -> Layer:
    """The leaves beside a head `[D, V]`: columns that start as its own."""
    columns = kernel[:, ids].astype(jnp.float32)
    return {IDS: ids, ACTIVE: jnp.ones(()), COLUMNS: columns}


def tied_leaves(table: Layer) -> Layer:
    """The leaves of a head whose kernel is the transposed table of this embedding."""
    if ROWS not in table:
        return {}
    return {IDS: table[IDS], ACTIVE: table[ACTIVE], COLUMNS: table[ROWS].T}


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y with the rows of the trained tokens in x, or with the logits of the trained tokens."""
    is_active = layer[ACTIVE] > 0
    ids = layer[IDS]
    if ROWS in layer:
        # A token behind the last trained one is compared with it, and does not match.
        place = jnp.minimum(jnp.searchsorted(ids, x), len(ids) - 1)
        is_trained = is_active & (ids[place] == x)
        rows = layer[ROWS].astype(y.dtype)
        return jnp.where(is_trained[..., None], rows[place], y)
    z = product.dot(x, layer[COLUMNS]).astype(y.dtype)
    return y.at[..., ids].set(jnp.where(is_active, z, y[..., ids]))


def merge(layer: Layer, base: Layer) -> Layer:
    """The kernel with the rows or columns of the trained tokens."""
    kernel = base["kernel"]
    ids = layer[IDS]
    is_active = layer[ACTIVE] > 0
    if ROWS in layer:
        trained = jnp.where(is_active, layer[ROWS], kernel[ids])
        return base | {"kernel": kernel.at[ids].set(trained)}
    trained = jnp.where(is_active, layer[COLUMNS], kernel[:, ids])
    return base | {"kernel": kernel.at[:, ids].set(trained)}


TERM = Term(
    leaves=(IDS, ACTIVE),
    one_of=(ROWS, COLUMNS),
    active=ACTIVE,
    loses_base=True,
    after=after,
    merge=merge,
)
