"""OFT v2 (2506.19847): the input is rotated in blocks of b, by the matrices that train.

    y = (x R) W,    R block-diagonal,    R_k = (I + Q_k) (I + Q_k + Q_k² + Q_k³)

Q_k is skew-symmetric, `[b, b]`, and its elements above the diagonal train. For small Q_k the sum is
close to (I − Q_k)⁻¹, and R_k to Cayley's rotation, so the angles between the columns of W, and
their norms, are kept. As the input is rotated and not the weight, the base's product stays the only
one. x R is rounded to the dtype of x: in bfloat16, rotations below 0.004 are lost in it.

Letters: K blocks, P the pairs b (b − 1) / 2 above a diagonal.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms.low_rank import expanded_to
from lorax_ft.lowrank.terms.term import Term, check_dense, saved
from lorax_ft.schema import Axis
from lorax_ft.tree import Layer, Shape

PAIRS, ACTIVE = "oft_pairs", "oft_active"


def planned(plan: Plan) -> tuple[str, ...]:
    """The elements of Q, where the method is OFT.

    Raises:
      ValueError: the module is not a dense layer, or its blocks have one row, which cannot rotate.
    """
    if plan.config.method != "oft":
        return ()
    check_dense(plan)
    if block_size(plan.rows, plan.config.oft_block_size) == 1:
        raise ValueError(
            f"{plan.paths[0]}: OFT would have blocks of one of its {plan.rows} inputs, which "
            "cannot rotate; give an adapter.oft_block_size near a divisor of them, or exclude it"
        )
    return (PAIRS, ACTIVE)


def own_sizes(plan: Plan) -> dict[Axis, int]:
    """The number of blocks and of the pairs in each."""
    b = block_size(plan.rows, plan.config.oft_block_size)
    return {"block": plan.rows // b, "pair": b * (b - 1) // 2}


def block_size(rows: int, wanted: int) -> int:
    """The divisor of `rows` that is nearest to the wanted block size, the smaller of two: PEFT's.

    >>> block_size(576, 32), block_size(100, 32), block_size(48, 64), block_size(97, 32)
    (32, 25, 48, 1)
    """
    if wanted >= rows:
        return rows
    smaller = next(b for b in range(wanted, 0, -1) if rows % b == 0)
    larger = next(b for b in range(wanted, rows + 1) if rows % b == 0)
    return smaller if wanted - smaller <= larger - wanted else larger


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """Q = 0, so that R = I."""
    if ACTIVE not in shapes:
        return {}
    return {
        PAIRS: jnp.zeros(shapes[PAIRS], jnp.float32),
        ACTIVE: jnp.asarray(plan.ranks > 0, jnp.float32),
    }


def before(layer: Layer, x: Array) -> Array:
    """x R, in float32 and then in the dtype of x."""
    r = saved(rotations(layer))
    blocks, b, _ = r.shape
    x_blocks = x.reshape(*x.shape[:-1], blocks, b).astype(jnp.float32)
    # With the blocks in front, neither this product nor those of its gradient transpose x again.
    x_blocks = jnp.moveaxis(x_blocks, -2, 0)  # [K, ..., b]
    rotated = jnp.einsum("k...b,kbc->k...c", x_blocks, r, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(rotated, 0, -2).reshape(x.shape).astype(x.dtype)


def merge(layer: Layer, base: Layer) -> Layer:
    """R W."""
    kernel = base["kernel"]
    r = rotations(layer)
    blocks, b, _ = r.shape
    w = kernel.reshape(blocks, b, kernel.shape[1])
    rotated = jnp.einsum("kbc,kco->kbo", r, w, precision=lax.Precision.HIGHEST)
    return base | {"kernel": rotated.reshape(kernel.shape)}


def rotations(layer: Layer) -> Array:
    """R `[K, b, b]`; I in matrices of a stack that are not adapted."""
    pairs = layer[PAIRS]
    active = expanded_to(layer[ACTIVE], pairs.ndim)
    q = skew_symmetric(active * pairs)
    squared = highest_matmul(q, q)
    # (I + 2 Q + Q²) (I + Q²)
    change = 2 * (q + squared) + highest_matmul(2 * q + squared, squared)
    return jnp.eye(q.shape[-1]) + change


def skew_symmetric(pairs: Array) -> Array:
    """Q `[K, b, b]` of its elements above the diagonal `[K, P]`, row by row."""
    b = side(pairs.shape[-1])
    rows, columns = np.triu_indices(b, 1)
    pair = np.zeros((b, b), int)
    pair[rows, columns] = np.arange(len(rows))
    sign = np.zeros((b, b), np.float32)
    sign[rows, columns] = 1
    # To gather is several times as fast as to scatter.
    return jnp.asarray(sign - sign.T) * pairs[:, pair + pair.T]


def side(pairs: int) -> int:
    """b of b (b − 1) / 2 pairs.

    >>> side(496), side(0)
    (32, 1)
    """
    return (1 + round((1 + 8 * pairs) ** 0.5)) // 2


TERM = Term(
    leaves=(PAIRS, ACTIVE),
    active=ACTIVE,
    loses_base=True,
    planned=planned,
    sizes=own_sizes,
    initial=initial,
    before=before,
    merge=merge,
)
