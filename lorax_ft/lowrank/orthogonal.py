"""Orthogonal start: A and B are both random and A B = 0, so the base stays as it is and both learn at once.

    A = N₁ Q_even / 10,   B = Q_oddᵀ N₂ / 10,   Q orthogonal, by its rows;   A B = N₁ (Q_even Q_oddᵀ) N₂ / 100 = 0

Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialization, as PEFT 0.21 has it. Letters: I
inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


def orthogonal(
    key: Array, own: Array, *, rows: int, columns: int, rank: int
) -> tuple[Array, Array]:
    """A `[I, R]` and B `[R, O]` of one matrix, whose first `own` columns and rows are those of its own, even rank.

    Args:
      key: the values depend on it and on `own` alone, not on R.
      own: the matrix's rank; what stands beyond it is not to be used.
      rows: I.
      columns: O.
      rank: R, even.
    """
    q_key, a_key, b_key = jax.random.split(key, 3)
    x = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(q_key, i), (rank,)))(
        jnp.arange(rank)
    )
    inside = jnp.arange(rank) < own
    q = jnp.linalg.qr(jnp.where(inside[:, None] & inside, x, jnp.eye(rank)))[
        0
    ]  # and so block by block
    left, right = (
        jax.random.normal(k, (rank // 2, n)) for k, n in ((a_key, rows), (b_key, columns))
    )
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return matmul(left.T, q[0::2]) / 10, matmul(q[1::2].T, right) / 10
