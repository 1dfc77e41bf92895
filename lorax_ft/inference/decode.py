"""The two compiled programs of generation: one reads the prompts, the other makes a token a round.

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
from lorax_ft.sharding import ROW_AXES
from lorax_ft.tree import Tree


class SamplingParams(NamedTuple):
    """How tokens are chosen and where a row ends, as arrays, so that other values are no other program."""

    temperature: Array | np.float32
    top_k: Array | np.int32
    top_p: Array | np.float32
    repetition_penalty: Array | np.float32
    stop: Array | np.ndarray
    """Ids that end a row, of any number; -1 is none."""
    key: Array
    length: Array
    """What each row may grow to, its prompt included, [B]."""


class State(NamedTuple):
    """Rows on their way."""

    step: Array
    """New tokens so far."""
    out: Array
    """The new tokens, [B, N]; what follows a row's stop means nothing."""
    last: Array
    """The newest token, [B]."""
    position: Array
    """The slot of the newest token, [B]."""
    counts: Array
    """New tokens of each row before its stop, [B]."""
    stopped: Array
    """Which rows have met a stop id, [B]."""
    seen: Array
    """Which tokens stand in each row, [B, V]."""
    cache: Cache


@functools.partial(jax.jit, static_argnames=("config", "room", "greedy", "mesh"))
def prefill(
    params: Tree,
    tokens: Array,
    lengths: Array,
    draw: SamplingParams,
    *,
    config: DecoderConfig,
    room: int,
    greedy: bool,
    mesh: Mesh | None,
) -> State:
    """Reads prompts, and makes the first token of each row.

    Args:
      params: parameters, with DoRA's norms.
      tokens: `[B, T]`, prompts padded on the right. The padding's keys and values lie in slots that no earlier
        position sees, and a new token overwrites its slot before anything looks there.
      lengths: `[B]`, of the prompts.
      draw: how a token is chosen.
      config: the decoder's.
      room: N, the most new tokens.
      greedy: takes the likeliest token each time; temperature, top_k, top_p and key play no part then.
      mesh: where the parameters lie, if on more than one device.
    """
    model = Model(config=config, params={})
    tokens, lengths = (_by_row(x, mesh) for x in (tokens, lengths))
    rows = len(tokens)
    cache: Cache | None = empty_cache(config, rows, tokens.shape[1] + room)
    features, cache = model.features(params, tokens, cache=cache, length=draw.length)
    assert cache is not None
    last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)[:, 0]
    zeros = jnp.zeros(rows, jnp.int32)
    prompt = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = (
        jnp.zeros((rows, config.vocab_size), bool).at[jnp.arange(rows)[:, None], tokens].max(prompt)
    )
    out = jnp.zeros((rows, room), jnp.int32)
    state = State(
        step=jnp.int32(0),
        out=out,
        last=zeros,
        position=lengths - 1,
        counts=zeros,
        stopped=jnp.zeros(rows, bool),
        seen=seen,
        cache=cache,
    )
    return _advance(state, model.logits(params, last), draw, greedy=greedy)


@functools.partial(
    jax.jit, static_argnames=("config", "greedy", "mesh"), donate_argnames=("state",)
)
def extend(
    params: Tree,
    state: State,
    until: Array,
    draw: SamplingParams,
    *,
    config: DecoderConfig,
    greedy: bool,
    mesh: Mesh | None,
) -> State:
    """Goes on until every row has met a stop id, or `until` new tokens are made; arguments as in `prefill`."""
    model = Model(config=config, params={})
    head = {"lm_head": model.head(params)}  # once, not in each round of the loop

    def body(state: State) -> State:
        features, cache = model.features(
            params,
            state.last[:, None],
            state.position[:, None],
            cache=state.cache,
            length=draw.length,
        )
        assert cache is not None
        return _advance(
            state._replace(cache=cache), model.logits(head, features[:, 0]), draw, greedy=greedy
        )

    end = lax.while_loop(lambda state: (state.step < until) & ~jnp.all(state.stopped), body, state)
    return end._replace(
        out=_whole(end.out, mesh),
        counts=_whole(end.counts, mesh),
        stopped=_whole(end.stopped, mesh),
    )


def sample_token(scores: Array, key: Array | None, draw: SamplingParams) -> Array:
    """The next token `[B]` by logits `[B, V]`: the likeliest without a key, else one drawn by each row's own key."""
    if key is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    order = jnp.argsort(scores, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1) / draw.temperature
    ranked = jnp.where(jnp.arange(scores.shape[-1]) < draw.top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked)
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < draw.top_p, ranked, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _advance(state: State, scores: Array, draw: SamplingParams, *, greedy: bool) -> State:
    """The state with one token more, by logits `[B, V]`."""
    scores = scores.astype(jnp.float32)
    damped = jnp.where(
        scores < 0, scores * draw.repetition_penalty, scores / draw.repetition_penalty
    )
    scores = jnp.where(state.seen, damped, scores)  # 1909.05858
    token = sample_token(scores, None if greedy else jax.random.fold_in(draw.key, state.step), draw)
    stopped = state.stopped | jnp.any(token[:, None] == draw.stop, axis=1)
    return State(
        step=state.step + 1,
        out=lax.dynamic_update_slice(state.out, token[:, None], (0, state.step)),
        last=token,
        position=state.position + 1,
        counts=state.counts + (~stopped).astype(jnp.int32),
        stopped=stopped,
        seen=state.seen.at[jnp.arange(len(token)), token].set(True),
        cache=state.cache,
    )


def _by_row(x: Array, mesh: Mesh | None) -> Array:
    """x with its first axis split over the mesh, where it divides."""
    axes = tuple(axis for axis in ROW_AXES if mesh and axis in mesh.shape)
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes)))


def _whole(x: Array, mesh: Mesh | None) -> Array:
    """x whole on every device, so that every process can read it."""
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
