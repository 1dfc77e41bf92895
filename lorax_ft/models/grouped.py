"""Rows sorted by expert, on one device or over a mesh.

Only chosen experts compute, so that the cost is that of `top_k` experts and not of all. On a mesh
the tokens are sorted in G groups. Where experts are split over P devices, each of the P devices of
a group sees all of its tokens and computes those of its own E / P experts, and the results are
summed over them: exact, however few experts the tokens choose.

Shapes: G groups, P parts of the experts, S = G P shards, N tokens of a group, K experts of a token,
M rows of a shard, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from lorax_ft.checks import alternatives, divisors
from lorax_ft.lowrank.experts import ExpertProduct, Rows
from lorax_ft.mesh_axes import (
    ROW_AXES,
    TOKEN_AXIS,
    dividing,
    expert_devices,
    row_devices,
    token_devices,
)
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.expert_products import by_block, ragged

MOST_BLOCK = 128
"""Rows of the largest block."""


class Routed(NamedTuple):
    """Where the copies of the tokens lie, one for each expert that a token chose."""

    rows: Rows
    place: Array
    """The row of each copy, `[S, N, K]`; M where its expert is in another part."""
    token: Array
    """The token of each row, `[S, M]`; N where a row is padding."""


def route(chosen: Array, *, experts: int, block: int, parts: int = 1) -> Routed:
    """Sort the copies of tokens by expert; each expert's rows start at a multiple of `block`.

    Args:
      chosen: the experts of each token, `[G, N, K]`.
      experts: E.
      block: rows of a block, all of one expert. 1 needs no padding.
      parts: P.
    """
    chosen = of_parts(chosen, parts)
    part = jnp.arange(len(chosen)) % parts
    own = functools.partial(_route, experts=experts // parts, block=block)
    return jax.vmap(own)(chosen, part)


def _route(chosen: Array, part: Array, *, experts: int, block: int) -> Routed:
    """The same of one shard, `[N, K]`, with so many experts of its own."""
    tokens, top_k = chosen.shape
    copies = chosen.reshape(-1) - part * experts  # the expert of each copy
    is_own = (copies >= 0) & (copies < experts)
    # Copies of other shards come last, and `bincount` leaves them out.
    copies = jnp.where(is_own, copies, experts)
    sizes = jnp.bincount(copies, length=experts)
    blocks = -(-sizes // block)  # rounded up
    most = tokens * min(top_k, experts)  # copies, as a token chooses an expert once
    # No more are needed than if the last block of each expert held a single row.
    count = min((most + experts * (block - 1)) // block, most)
    first = jnp.cumsum(blocks) - blocks  # the first block of each expert
    start = jnp.cumsum(sizes) - sizes  # the first copy of each expert, in sorted order
    # Stable, so that a run is the same on any machine.
    order = jnp.argsort(copies, stable=True)
    expert = copies[order]
    place = first[expert] * block + jnp.arange(len(copies)) - start[expert]
    place = jnp.where(is_own[order], place, count * block)
    token = jnp.full(count * block, tokens).at[place].set(order // top_k, mode="drop")
    of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(count), side="right")
    # Blocks behind the last one hold padding alone.
    of_block = jnp.minimum(of_block, experts - 1) + part * experts
    rows = Rows(expert=jnp.repeat(of_block, block), sizes=blocks * block)
    places = jnp.zeros_like(place).at[order].set(place)
    return Routed(rows=rows, place=places.reshape(chosen.shape), token=token)


def gather_tokens(x: Array, routed: Routed) -> Array:
    """The rows `[S, M, D]` of tokens `[G, N, D]`; padding is 0."""

    def gather(x: Array, token: Array) -> Array:
        return x.at[token].get(mode="fill", fill_value=0)

    return jax.vmap(gather)(of_parts(x, len(routed.token) // len(x)), routed.token)


def combine_rows(y: Array, weights: Array, routed: Routed) -> Array:
    """Σ weight · y over the copies of each token: `[S, M, D]` and `[G, N, K]` to `[G, N, D]`."""

    def combine(y: Array, weights: Array, place: Array) -> Array:
        # The sum over parts has the copies that are elsewhere.
        copies = y.at[place].get(mode="fill", fill_value=0)
        return jnp.einsum("nkd,nk->nd", copies, weights.astype(y.dtype))

    groups = len(weights)
    parts = len(y) // groups
    combined = jax.vmap(combine)(y, of_parts(weights, parts), routed.place)
    if parts == 1:
        return combined
    by_part = combined.reshape(groups, parts, *combined.shape[1:])
    # Each device keeps the sums of its own rows.
    of_groups = ROW_AXES[:-1] if _is_split(len(y)) else None
    of_tokens = "expert" if combined.shape[1] % parts == 0 else None
    return lax.with_sharding_constraint(jnp.sum(by_part, axis=1), P(of_groups, of_tokens))


class Shards(NamedTuple):
    """How a batch `[B, T, ...]` is cut into G groups `[G, N, ...]` that are sorted apart.

    One for each device, or for each set of devices that shares the experts.
    """

    rows: int
    """The parts of the B rows."""
    batch: int
    """B."""
    tokens: int
    """The parts of the T tokens of a row."""


def shards_of(rows: int, tokens: int) -> Shards:
    """The groups of a batch on the ambient mesh; one, where it does not divide."""
    if dividing(ROW_AXES, rows) is None or dividing(TOKEN_AXIS, tokens) is None:
        return Shards(1, rows, 1)
    return Shards(row_devices() // expert_devices(), rows, token_devices())


def by_shard(x: Array, shards: Shards) -> Array:
    """`[B, T, ...]` as `[G, N, ...]`."""
    _, tokens, *rest = x.shape
    rows = shards.batch // shards.rows
    parts = x.reshape(shards.rows, rows, shards.tokens, tokens // shards.tokens, *rest)
    parts = jnp.moveaxis(parts, 2, 1)
    return parts.reshape(shards.rows * shards.tokens, -1, *rest)


def from_shards(x: Array, shards: Shards) -> Array:
    """`[G, N, ...]` as `[B, T, ...]`."""
    rest = x.shape[2:]
    parts = x.reshape(shards.rows, shards.tokens, shards.batch // shards.rows, -1, *rest)
    parts = jnp.moveaxis(parts, 1, 2)
    return parts.reshape(shards.batch, -1, *rest)


def of_parts(x: Array, parts: int) -> Array:
    """x `[G, ...]` of each group as each part of the experts has it, `[G P, ...]`."""
    if parts == 1:
        return x
    # Every device of a group gets the rows of all of them.
    whole = P(ROW_AXES[:-1]) if _is_split(len(x) * parts) else P()
    x = lax.with_sharding_constraint(x, whole)
    shards = jnp.repeat(x, parts, axis=0)
    return lax.with_sharding_constraint(shards, P(_shard_axes(len(shards))))


def _is_split(shards: int) -> bool:
    """Whether each device of the ambient mesh has a shard of its own."""
    return shards == row_devices() * token_devices()


def _shard_axes(shards: int) -> tuple[str, ...]:
    """The mesh axes of the shards: where rows do not divide over the mesh, that of the experts."""
    return (*ROW_AXES, TOKEN_AXIS) if _is_split(shards) else ("expert",)


def check_expert_axis(config: DecoderConfig, devices: int, *, source: str) -> None:
    """Raise if the experts of a model cannot be split over so many devices.

    Args:
      config: the model's.
      devices: the size of the mesh axis expert.
      source: names the model in the error.

    Raises:
      ValueError: they do not divide, or there are none; the error says what would do.
    """
    if devices == 1:
        return
    if config.experts is None:
        raise ValueError(
            f"mesh.expert is {devices}, but {source} has no experts; "
            "mesh.fsdp splits the weights of any model"
        )
    count = config.experts.count
    if count % devices:
        raise ValueError(
            f"mesh.expert is {devices}, which does not divide the {count} experts of {source}; "
            f"{alternatives(divisors(count))} would"
        )


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
    product = ragged if kind == "ragged" else functools.partial(by_block, block=block)

    def local(x: Array, kernels: Any, rows: Rows) -> Array:
        """Of one shard: S is 1, and the kernels are those of its part of the experts."""
        expert, sizes = rows
        own_rows = Rows(expert=expert[0] % sizes.shape[-1], sizes=sizes[0])
        return product(x[0], kernels, own_rows)[None]

    def each_shard(x: Array, kernels: Any, rows: Rows) -> Array:
        if len(x) == 1:
            return local(x, kernels, rows)
        # Kernels come whole over the other axes, and stay split over expert and tensor.
        axes = _shard_axes(len(x))
        split = P(axes)
        mapped = jax.shard_map(
            local,
            in_specs=(split, P("expert"), split),
            out_specs=split,
            axis_names=set(axes),
            # The sums of `_backward` start from zeros that are the same on all devices.
            check_vma=False,
        )
        return mapped(x, kernels, rows)

    return each_shard
