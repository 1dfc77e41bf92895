"""The compiled program of generation: one pass over the prompts, then a loop that makes a token a round.

Letters: B rows of a batch, T tokens of a padded prompt, S slots of the cache, N room for new tokens, D width,
V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.models.attention import Cache, empty_cache
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

BATCH_AXES = ("data", "fsdp")  # the mesh's axes that rows are split over


class Sampling(NamedTuple):
    """How a token is drawn, as scalars, so that other numbers are no other program."""

    temperature: Array | np.float32
    top_k: Array | np.int32
    top_p: Array | np.float32


class State(NamedTuple):
    """What goes around the loop."""

    step: Array
    """New tokens so far."""
    out: Array
    """The new tokens, [B, N]; what follows a row's stop means nothing."""
    last: Array
    """The newest token, [B]."""
    counts: Array
    """New tokens of each row before its stop, [B]."""
    stopped: Array
    """Which rows have met a stop id, [B]."""
    cache: Cache


@functools.partial(jax.jit, static_argnames=("config", "room", "greedy", "mesh"))
def decode(
    params: Tree,
    tokens: Array,
    lengths: Array,
    limit: Array,
    stop: Array,
    sampling: Sampling,
    key: Array,
    *,
    config: DecoderConfig,
    room: int,
    greedy: bool,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Continues prompts until every row has met a stop id or `limit` new tokens are made.

    Args:
      params: parameters, with DoRA's norms.
      tokens: `[B, T]`, prompts padded on the right. The padding's keys and values lie in slots that no earlier
        position sees, and a new token overwrites its slot before anything looks there.
      lengths: `[B]`, of the prompts.
      limit: at most N.
      stop: ids, of any number; -1 is none.
      sampling: how a token is drawn.
      key: for drawing.
      config: the decoder's.
      room: N.
      greedy: takes the likeliest token each time; `sampling` and `key` play no part then.
      mesh: where the parameters lie, if on more than one device.

    Returns:
      The new tokens `[B, N]`, and how many of each row come before its stop, `[B]`.
    """
    model = Model(config=config, params={})
    head = {"lm_head": model.head(params)}  # once, not in each round of the loop
    tokens, lengths = (_by_row(x, mesh) for x in (tokens, lengths))

    def advance(state: State, features: Array) -> State:
        scores = model.logits(head, features).astype(jnp.float32)  # [B, D] -> [B, V]
        token = pick(scores, None if greedy else jax.random.fold_in(key, state.step), sampling)
        stopped = state.stopped | jnp.any(token[:, None] == stop, axis=1)
        out = lax.dynamic_update_slice(state.out, token[:, None], (0, state.step))
        return State(state.step + 1, out, token, state.counts + (~stopped).astype(jnp.int32), stopped, state.cache)

    def body(state: State) -> State:
        positions = (lengths + state.step - 1)[:, None]
        features, cache = model.features(params, state.last[:, None], positions, cache=state.cache)
        assert cache is not None
        return advance(state._replace(cache=cache), features[:, 0])

    cache = empty_cache(config, len(tokens), tokens.shape[1] + room)
    features, filled = model.features(params, tokens, cache=cache)
    assert filled is not None
    last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = advance(_start(len(tokens), room, filled), last)
    end = lax.while_loop(lambda state: (state.step < limit) & ~jnp.all(state.stopped), body, first)
    return _whole(end.out, mesh), _whole(end.counts, mesh)


def pick(scores: Array, key: Array | None, sampling: Sampling) -> Array:
    """The next token `[B]` by logits `[B, V]`: the likeliest without a key, else one drawn by each row's own key."""
    if key is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    order = jnp.argsort(scores, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1) / sampling.temperature
    ranked = jnp.where(jnp.arange(scores.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked)
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < sampling.top_p, ranked, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _start(rows: int, room: int, cache: Cache) -> State:
    """No new token yet."""
    zeros = jnp.zeros(rows, jnp.int32)
    out = jnp.zeros((rows, room), jnp.int32)
    return State(jnp.int32(0), out, last=zeros, counts=zeros, stopped=zeros > 0, cache=cache)


def _by_row(x: Array, mesh: Mesh | None) -> Array:
    """x with its first axis split over the mesh, where it divides."""
    axes = tuple(axis for axis in BATCH_AXES if mesh and axis in mesh.shape)
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes)))


def _whole(x: Array, mesh: Mesh | None) -> Array:
    """x whole on every device, so that every process can read it."""
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
