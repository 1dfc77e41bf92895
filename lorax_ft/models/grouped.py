"""Rows sorted by expert, and the products of each row with its expert's kernel.

Only chosen experts compute, so that the cost is that of `top_k` experts and not of all. Shapes: S
shards, N tokens of a shard, K experts of a token, M rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from lorax_ft.lowrank.experts import ExpertProduct, Rows
from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, dividing, row_devices, token_devices
from lorax_ft.models.config import DecoderConfig
from lorax_ft.quant.kernels import Quantized, dense

MOST_BLOCK = 128
"""Rows of the largest block."""


class Routed(NamedTuple):
    """Where the copies of the tokens lie, one for each expert that a token chose."""

    rows: Rows
    place: Array
    """The row of each copy, `[S, N, K]`."""
    token: Array
    """The token of each row, `[S, M]`; N where a row is padding."""


def route(chosen: Array, *, experts: int, block: int) -> Routed:
    """Sort the copies of tokens by expert; each expert's rows start at a multiple of `block`.

    Args:
      chosen: the experts of each token, `[S, N, K]`.
      experts: E.
      block: rows of a block, all of one expert. 1 needs no padding.
    """
    return jax.vmap(functools.partial(_route, experts=experts, block=block))(chosen)


def _route(chosen: Array, *, experts: int, block: int) -> Routed:
    """The same of one shard: `[N, K]`."""
    tokens, top_k = chosen.shape
    copies = chosen.reshape(-1)  # the expert of each copy
    sizes = jnp.bincount(copies, length=experts)
    blocks = -(-sizes // block)  # rounded up
    # No more are needed than if the last block of each expert held a single row.
    count = min((len(copies) + experts * (block - 1)) // block, len(copies))
    first = jnp.cumsum(blocks) - blocks  # the first block of each expert
    start = jnp.cumsum(sizes) - sizes  # the first copy of each expert, in sorted order
    # Stable, so that a run is the same on any machine.
    order = jnp.argsort(copies, stable=True)
    expert = copies[order]
    place = first[expert] * block + jnp.arange(len(copies)) - start[expert]
    token = jnp.full(count * block, tokens).at[place].set(order // top_k)
    of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(count), side="right")
    # Blocks behind the last one hold padding alone.
    of_block = jnp.minimum(of_block, experts - 1)
    rows = Rows(expert=jnp.repeat(of_block, block), sizes=blocks * block)
    places = jnp.zeros_like(place).at[order].set(place)
    return Routed(rows=rows, place=places.reshape(chosen.shape), token=token)


def gather_tokens(x: Array, routed: Routed) -> Array:
    """The rows `[S, M, D]` of tokens `[S, N, D]`; padding is 0."""

    def gather(x: Array, token: Array) -> Array:
        return x.at[token].get(mode="fill", fill_value=0)

    return jax.vmap(gather)(x, routed.token)


def combine_rows(y: Array, weights: Array, routed: Routed) -> Array:
    """Σ weight · y over the copies of each token: `[S, M, D]` and `[S, N, K]` to `[S, N, D]`."""

    def combine(y: Array, weights: Array, place: Array) -> Array:
        return jnp.einsum("nkd,nk->nd", y[place], weights.astype(y.dtype))

    return jax.vmap(combine)(y, weights, routed.place)


class Shards(NamedTuple):
    """How a batch `[B, T, ...]` is cut into S shards `[S, N, ...]`, one for each device."""

    rows: int
    """The parts of the B rows."""
    batch: int
    """B."""
    tokens: int
    """The parts of the T tokens of a row."""


def shards_of(rows: int, tokens: int) -> Shards:
    """The shards of a batch on the ambient mesh; one, where it does not divide."""
    if dividing(ROW_AXES, rows) is None or dividing(TOKEN_AXIS, tokens) is None:
        return Shards(1, rows, 1)
    return Shards(row_devices(), rows, token_devices())


def by_shard(x: Array, shards: Shards) -> Array:
    """`[B, T, ...]` as `[S, N, ...]`."""
    _, tokens, *rest = x.shape
    rows = shards.batch // shards.rows
    parts = x.reshape(shards.rows, rows, shards.tokens, tokens // shards.tokens, *rest)
    parts = jnp.moveaxis(parts, 2, 1)
    return parts.reshape(shards.rows * shards.tokens, -1, *rest)


def from_shards(x: Array, shards: Shards) -> Array:
    """`[S, N, ...]` as `[B, T, ...]`."""
    rest = x.shape[2:]
    parts = x.reshape(shards.rows, shards.tokens, shards.batch // shards.rows, -1, *rest)
    parts = jnp.moveaxis(parts, 1, 2)
    return parts.reshape(shards.batch, -1, *rest)


def block_rows(copies: int, experts: int, kind: str) -> int:
    """The rows of a block: 1 where blocks are not needed, else about a quarter of an expert's.

    Padding fills half a block of each expert on average, and small blocks multiply slowly.
    """
    if kind == "ragged":
        return 1
    block = 8
    while 2 * block <= min(copies // (4 * experts), MOST_BLOCK):
        block *= 2
    return block


def product_kind(config: DecoderConfig) -> str:
    """How experts multiply here, as `model.expert_products` says."""
    if config.expert_products != "auto":
        return config.expert_products
    return "blocks" if jax.default_backend() == "cpu" else "ragged"


def product_of(kind: str, *, block: int) -> ExpertProduct:
    """The product of rows that were sorted in blocks of this size."""
    product = _ragged if kind == "ragged" else functools.partial(_by_block, block=block)

    def local(x: Array, kernels: Any, rows: Rows) -> Array:
        """Of one shard: S is 1."""
        own_rows = jax.tree.map(lambda leaf: leaf[0], rows)
        return product(x[0], kernels, own_rows)[None]

    def each_shard(x: Array, kernels: Any, rows: Rows) -> Array:
        if len(x) == 1:
            return local(x, kernels, rows)
        # Kernels come whole over the axes of rows and tokens, and stay split over tensor.
        axes = (*ROW_AXES, TOKEN_AXIS)
        split = P(axes)
        mapped = jax.shard_map(
            local,
            in_specs=(split, P(), split),
            out_specs=split,
            axis_names=set(axes),
            # The sums of `_backward` start from zeros that are the same on all devices.
            check_vma=False,
        )
        return mapped(x, kernels, rows)

    return each_shard


def _ragged(x: Array, kernels: Array | Quantized, rows: Rows) -> Array:
    """By XLA's own product of ragged groups."""
    return lax.ragged_dot(x, dense(kernels, x.dtype), rows.sizes)


def _by_block(x: Array, kernels: Array | Quantized, rows: Rows, *, block: int) -> Array:
    """One block after another, each with one kernel; of quantized ones one is dense at a time."""
    blocks = x.reshape(-1, block, x.shape[-1])
    expert = rows.expert[::block]
    if isinstance(kernels, Quantized):
        # Frozen: the gradient goes to x alone.
        kernels = lax.stop_gradient(kernels)

        @jax.checkpoint
        def multiply(x: Array, expert: Array) -> Array:
            return x @ dense(_kernel_of(kernels, expert), x.dtype)

        y = lax.map(lambda block: multiply(*block), (blocks, expert))
    else:
        y = _multiply_blocks(blocks, kernels, expert)
    return y.reshape(len(x), -1)


def _kernel_of(kernels: Any, expert: Array) -> Any:
    """One expert's kernel, of arrays or quantized leaves `[E, ...]`."""

    def take(leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, expert, keepdims=False)

    return jax.tree.map(take, kernels)


@jax.custom_vjp
def _multiply_blocks(x: Array, kernels: Array, expert: Array) -> Array:
    """x `[C, R, I]` of C blocks times the kernel `[I, O]` of each one's expert."""
    return lax.map(lambda block: block[0] @ _kernel_of(kernels, block[1]), (x, expert))


def _forward(x: Array, kernels: Array, expert: Array) -> tuple[Array, tuple[Array, ...]]:
    return _multiply_blocks(x, kernels, expert), (x, kernels, expert)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, None]:
    """dx = g Wᵀ, and dW = Σ xᵀ g over the blocks of each expert, added up in place.

    JAX's own rule would make an array of all kernels for each block. XLA leaves out the second loop
    where the kernels are frozen.
    """
    x, kernels, expert = residuals
    dx = lax.map(lambda block: block[0] @ _kernel_of(kernels, block[1]).T, (g, expert))

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, expert = block
        # In float32 also of bfloat16, as there are many blocks.
        return total.at[expert].add(jnp.matmul(x.T, g, preferred_element_type=total.dtype)), None

    total, _ = lax.scan(add, jnp.zeros(kernels.shape, jnp.float32), (x, g, expert))
    return dx, total.astype(kernels.dtype), None


_multiply_blocks.defvjp(_forward, _backward)
