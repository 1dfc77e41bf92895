"""The gated delta rule (2412.06464), in chunks of tokens.

A state S `[Cₖ, Cᵥ]` of each head maps keys to values. A token decays it by α, and replaces what it
holds for the token's key k by the value v, in part β:

    S ← α S + β k (v − α Sᵀ k)ᵀ,    o = Sᵀ q

Within a chunk, all tokens' corrections Δ = v − α Sᵀ k follow from one triangular system
(2406.06484), so that only the state at the borders of chunks is computed in turn.

Letters: B batch, T tokens, H heads, Cₖ channels of a key, Cᵥ of a value, n chunks, c tokens of a
chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# The most tokens of a chunk, a power of 2.
CHUNK = 64
# Accelerators multiply float32 in fewer bits by default, which the inverse of a system and a state
# that sums over a whole text do not bear.
PRECISION = "highest"


class Chunks(NamedTuple):
    """What does not depend on the state, for each chunk: leaves `[n, B, H, c, ...]`."""

    q: Array
    """Queries, decayed from the chunk's start on: they read the state before the chunk."""
    k: Array
    """Keys, decayed up to the chunk's end: they write to the state after it."""
    scores: Array
    """Of each query with the keys up to its own, decayed in between, `[n, B, H, c, c]`."""
    values: Array
    """Corrections if the state before the chunk were 0, `[n, B, H, c, Cᵥ]`."""
    reads: Array
    """Their change with that state, `[n, B, H, c, Cₖ]`."""
    decay: Array
    """Of the state by the whole chunk, `[n, B, H, 1, 1]`; 0 where another text starts in it."""


@jax.default_matmul_precision(PRECISION)
def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array,
    beta: Array,
    state: Array,
    runs: Array | None = None,
) -> tuple[Array, Array]:
    """The outputs o `[B, T, H, Cᵥ]`, and the state after the last token, both in float32.

    Args:
      q: queries `[B, T, H, Cₖ]`.
      k: keys, as the queries, of length 1.
      v: values `[B, T, H, Cᵥ]`.
      log_decay: ln α `[B, T, H]`, at most 0.
      beta: β `[B, T, H]`; a token with β = 0 and ln α = 0 leaves the state as it is.
      state: `[B, H, Cₖ, Cᵥ]` before the first token, which belongs to the first token's text.
      runs: `[B, T]`, numbers the texts of a row from 0; each starts with a state of 0. None: the
        row is one text.
    """
    tokens = q.shape[1]
    if runs is None:
        runs = jnp.zeros(q.shape[:2], jnp.int32)
    # A short text is one chunk; the inverse of its system needs a power of 2.
    power_of_2 = 1 << (tokens - 1).bit_length()
    size = min(CHUNK, power_of_2)
    # The tokens that fill up the last chunk belong to its last text.
    runs = _chunked(runs[..., None], size, mode="edge")  # [n, B, 1, c]
    chunks = _prepared(
        _chunked(q, size),
        _chunked(k, size),
        _chunked(v, size),
        _chunked(log_decay, size),
        _chunked(beta, size),
        runs,
    )
    state, o = lax.scan(_step, state.astype(jnp.float32), chunks)
    n, b, h, c, width = o.shape
    o = o.transpose(1, 0, 3, 2, 4)  # [B, n, c, H, Cᵥ]
    o = o.reshape(b, n * c, h, width)
    return o[:, :tokens], state


def _step(state: Array, chunk: Chunks) -> tuple[Array, Array]:
    """The state after a chunk, and the chunk's outputs `[B, H, c, Cᵥ]`."""
    delta = chunk.values - chunk.reads @ state
    from_before = chunk.q @ state
    from_chunk = chunk.scores @ delta
    decayed = chunk.decay * state
    written = chunk.k.mT @ delta
    return decayed + written, from_before + from_chunk


def _chunked(x: Array, size: int, *, mode: str = "constant") -> Array:
    """`[B, T, H, ...]` to `[n, B, H, c, ...]` in float32, or in integers as they are.

    Tokens that fill up the last chunk are 0 or, with the mode "edge", as the last token.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    b, t, *rest = x.shape
    missing = -t % size
    whole = (0, 0)
    widths = [whole, (0, missing)]
    for _ in rest:
        widths.append(whole)
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(b, -1, size, *rest)  # [B, n, c, H, ...]
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    runs: Array,
) -> Chunks:
    """The chunks, from leaves `[n, B, H, c, ...]` and runs `[n, B, 1, c]` for all heads."""
    beta = beta[..., None]
    total = jnp.cumsum(log_decay, axis=-1)  # ln of the decay from the chunk's start
    # The text before a chunk is that of the token before it, and for the first chunk of its first.
    first = runs[:1, ..., :1]
    last = runs[..., -1:]
    before = jnp.concatenate([first, last[:-1]])
    continues = runs == before
    to_end = runs == last

    between = _decay_between(total, runs)
    from_start = jnp.where(continues, jnp.exp(total), 0)[..., None]
    left = total[..., -1:] - total
    until_end = jnp.where(to_end, jnp.exp(left), 0)[..., None]

    # Δ + tril(β k kᵀ · decay) Δ = β v − β k · decay · S, row by row of the chunk.
    written = beta * k
    system = jnp.tril((written @ k.mT) * between, -1)
    right = jnp.concatenate([beta * v, written * from_start], axis=-1)
    solved = _inverse(system) @ right
    values, reads = jnp.split(solved, [v.shape[-1]], axis=-1)
    return Chunks(
        q=q * from_start,
        k=k * until_end,
        scores=(q @ k.mT) * between,
        values=values,
        reads=reads,
        decay=from_start[..., -1:, :],
    )


def _decay_between(total: Array, runs: Array) -> Array:
    """The decay from each earlier token to each token of its text, `[n, B, H, c, c]`; else 0.

    Args:
      total: ln of the decay from the chunk's start, `[n, B, H, c]`.
      runs: `[n, B, 1, c]`.
    """
    between = total[..., :, None] - total[..., None, :]
    same_text = runs[..., :, None] == runs[..., None, :]
    earlier = jnp.tril(same_text)
    # The differences of later tokens, and of other texts, may overflow.
    masked = jnp.where(earlier, between, -jnp.inf)
    return jnp.exp(masked)


def _inverse(system: Array) -> Array:
    """(I + system)⁻¹ of strictly lower triangular systems `[..., c, c]`, c a power of 2.

    From blocks of 1 × 1 on, two inverses and the block below the first give one of twice the size.
    jax.scipy's solve_triangular can hang on a CPU (jaxlib 0.10.2): its batches wait for threads of
    the pool that they themselves hold.
    """
    *leading, c, _ = system.shape
    inverse = jnp.ones((*leading, c, 1, 1), system.dtype)
    size = 1
    while size < c:
        first = inverse[..., ::2, :, :]
        second = inverse[..., 1::2, :, :]
        pairs = c // (2 * size)
        blocks = system.reshape(*leading, pairs, 2 * size, pairs, 2 * size)
        diagonal = jnp.diagonal(blocks, axis1=-4, axis2=-2)  # [..., 2 size, 2 size, pairs]
        below = jnp.moveaxis(diagonal, -1, -3)[..., size:, :size]
        # [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]]
        corner = -second @ below @ first
        zeros = jnp.zeros_like(first)
        upper = jnp.concatenate([first, zeros], axis=-1)
        lower = jnp.concatenate([corner, second], axis=-1)
        inverse = jnp.concatenate([upper, lower], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]
