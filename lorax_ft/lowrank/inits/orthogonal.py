"""Orthogonal start: A and B are both random and A B = 0; the base stays and both learn at once.

    A = N₁ Q_even / 10,   B = Q_oddᵀ N₂ / 10,   Q orthogonal, by its rows
    A B = N₁ (Q_even Q_oddᵀ) N₂ / 100 = 0

As in PEFT 0.21. Source:
https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import Factors


def orthogonal(context: InitContext) -> InitResult:
    """Random A and B with A B = 0."""
    _, rows, columns = context.shape
    one = functools.partial(
        orthogonal_pair,
        rows=rows,
        columns=columns,
        rank=context.rank,
    )
    own_ranks = jnp.asarray(context.ranks)
    factors = jax.vmap(one)(context.keys, own_ranks)
    return InitResult(factors)


def orthogonal_pair(
    key: Array,
    own: Array,
    *,
    rows: int,
    columns: int,
    rank: int,
) -> Factors:
    """A `[I, R]` and B `[R, O]` of one matrix; its first columns and rows are those of a smaller R.

    Args:
      key: the values depend on it and on `own` alone, not on R.
      own: the matrix's own rank, even; columns of A and rows of B beyond it are meaningless.
      rows: I.
      columns: O.
      rank: R, even.
    """
    q_key, a_key, b_key = jax.random.split(key, 3)

    def random_row(i: Array) -> Array:
        row_key = jax.random.fold_in(q_key, i)
        return jax.random.normal(row_key, (rank,))

    # A key for each row, so that a smaller R has the first rows and columns of the same values.
    x = jax.vmap(random_row)(jnp.arange(rank))
    # An identity block beyond the own rank makes Q's first block orthogonal by itself.
    inside = jnp.arange(rank) < own
    is_own = inside[:, None] & inside
    blocks = jnp.where(is_own, x, jnp.eye(rank))
    q, _ = jnp.linalg.qr(blocks)
    left = jax.random.normal(a_key, (rank // 2, rows))
    right = jax.random.normal(b_key, (rank // 2, columns))
    a = highest_matmul(left.T, q[0::2]) / 10
    b = highest_matmul(q[1::2].T, right) / 10
    return a, b
