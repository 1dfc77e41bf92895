"""The two compiled programs of generation: `prefill` reads the prompts, `decode` adds the tokens.

Letters: B rows of a batch, T tokens of a padded prompt, N maximum number of new tokens, D width,
V vocabulary. The cache has T + N slots per row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, devices_along
from lorax_ft.models.cache import Cache, empty_cache
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import CausalLM
from lorax_ft.tree import Tree

TEXT_AXES = (*ROW_AXES, TOKEN_AXIS)
"""The mesh axes that texts are split over; each is whole on its devices."""


class SamplingParams(NamedTuple):
    """How tokens are sampled and where a row stops; arrays, so that new values do not recompile."""

    temperature: Array | np.float32
    top_k: Array | np.int32
    top_p: Array | np.float32
    repetition_penalty: Array | np.float32
    stop_ids: Array | np.ndarray
    """Token ids that end a row, padded with -1."""
    key: Array
    max_length: Array
    """Maximum length of each row, prompt plus new tokens, [B]."""


class DecodeState(NamedTuple):
    """What one decoding step passes to the next."""

    step: Array
    """Number of new tokens so far."""
    new_tokens: Array
    """The new tokens, [B, N]; the values after a row's stop id are meaningless."""
    last_token: Array
    """The most recent token, [B]."""
    position: Array
    """The cache slot of the most recent token, [B]."""
    counts: Array
    """Number of new tokens of each row before its stop id, [B]."""
    stopped: Array
    """Which rows have reached a stop id, [B]."""
    seen: Array
    """Which tokens of the vocabulary occur in each row, [B, V]."""
    active: Array | None
    """Whether an activated LoRA acts in the new tokens of each row, [B]; None: LoRA acts in all."""
    cache: Cache


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "greedy", "mesh"))
def prefill(
    params: Tree,
    tokens: Array,
    lengths: Array,
    sampling_params: SamplingParams,
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    greedy: bool,
    mesh: Mesh | None,
) -> DecodeState:
    """Reads the prompts and generates the first token of each row.

    Args:
      params: parameters, with DoRA's norms.
      tokens: `[B, T]`, prompts padded on the right. No earlier position attends to the padding's
        keys and values, and each new token overwrites its slot before any position reads it.
      lengths: `[B]`, lengths of the prompts.
      sampling_params: how tokens are sampled and where a row stops.
      config: the decoder's.
      max_new_tokens: N.
      greedy: pick the most likely token; temperature, top_k, top_p and key are ignored.
      mesh: the mesh that the parameters are sharded over, or None.
    """
    model = CausalLM(config=config)
    tokens = shard_rows(tokens, mesh)
    lengths = shard_rows(lengths, mesh)
    batch, padded = tokens.shape
    cache: Cache | None = empty_cache(config, batch, padded + max_new_tokens)
    is_text = (jnp.arange(padded) < lengths[:, None]).astype(jnp.int32)
    active = model.active_tokens(params, tokens, is_text)
    features, cache = model.features(
        params,
        tokens,
        cache=cache,
        length=sampling_params.max_length,
        counts=lengths,
        active=active,
    )
    assert cache is not None
    # Prompts are padded on the right, so the last token of each row is at a different column.
    columns = (lengths - 1)[:, None, None]
    last = jnp.take_along_axis(features, columns, axis=1)  # [B, 1, D]
    last = last[:, 0]
    zeros = jnp.zeros(batch, jnp.int32)
    seen = _tokens_of_prompts(tokens, lengths, config.vocab_size)
    state = DecodeState(
        step=jnp.int32(0),
        new_tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        last_token=zeros,
        position=lengths - 1,
        counts=zeros,
        stopped=jnp.zeros(batch, bool),
        seen=seen,
        active=None if active is None else jnp.any(active, axis=1),
        cache=cache,
    )
    logits = model.logits(params, last)
    return _append_token(state, logits, sampling_params, greedy=greedy)


# The state is donated: its cache, the largest array here, is updated in place, not copied.
@functools.partial(
    jax.jit, static_argnames=("config", "greedy", "mesh"), donate_argnames=("state",)
)
def decode(
    params: Tree,
    state: DecodeState,
    until: Array,
    sampling_params: SamplingParams,
    *,
    config: DecoderConfig,
    greedy: bool,
    mesh: Mesh | None,
) -> DecodeState:
    """Generates until every row has reached a stop id or has `until` new tokens.

    Args as in `prefill`. `state` is donated: the caller must not use it afterwards.
    """
    model = CausalLM(config=config)
    # The head is transposed and cast here, once, instead of in every iteration of the loop.
    head = model.head(params)

    def unfinished(state: DecodeState) -> Array:
        return (state.step < until) & ~jnp.all(state.stopped)

    def step(state: DecodeState) -> DecodeState:
        features, cache = model.features(
            params,
            state.last_token[:, None],
            state.position[:, None],
            cache=state.cache,
            length=sampling_params.max_length,
            active=None if state.active is None else state.active[:, None],
        )
        assert cache is not None
        state = state._replace(cache=cache)
        logits = model.score(head, features[:, 0])
        return _append_token(state, logits, sampling_params, greedy=greedy)

    state = lax.while_loop(unfinished, step, state)
    # With several processes, each can read only arrays that its own devices hold in full.
    return state._replace(
        new_tokens=replicate(state.new_tokens, mesh),
        counts=replicate(state.counts, mesh),
        stopped=replicate(state.stopped, mesh),
    )


def sample_token(logits: Array, key: Array | None, sampling_params: SamplingParams) -> Array:
    """The next token `[B]` from logits `[B, V]`.

    Without a key this is the most likely token. With a key it is sampled, after temperature, top-k
    and top-p, in this order.
    """
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = ranked / sampling_params.temperature
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where(rank < sampling_params.top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked)
    # Mass before the token, without its own: the token that crosses top_p stays in (1904.09751).
    mass_before = jnp.cumsum(p, axis=-1) - p
    ranked = jnp.where(mass_before < sampling_params.top_p, ranked, -jnp.inf)
    # One key per row, so that a row's sample does not depend on the other rows.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    sampled = jax.vmap(jax.random.categorical)(keys, ranked)
    # From places in the order back to token ids.
    tokens = jnp.take_along_axis(order, sampled[:, None], axis=-1)
    return tokens[:, 0].astype(jnp.int32)


def _append_token(
    state: DecodeState,
    logits: Array,
    sampling_params: SamplingParams,
    *,
    greedy: bool,
) -> DecodeState:
    """The state with one more token, chosen by logits `[B, V]`."""
    logits = logits.astype(jnp.float32)
    penalty = sampling_params.repetition_penalty
    # CTRL (1909.05858) divides every logit, which would favor tokens with a negative one; as in
    # transformers, those are multiplied.
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(state.seen, penalized, logits)
    key = None
    if not greedy:
        key = jax.random.fold_in(sampling_params.key, state.step)
    token = sample_token(logits, key, sampling_params)
    column = token[:, None]
    stops = jnp.any(column == sampling_params.stop_ids, axis=1)
    stopped = state.stopped | stops
    # The stop id itself does not count.
    counted = (~stopped).astype(jnp.int32)
    rows = jnp.arange(len(token))
    return DecodeState(
        step=state.step + 1,
        new_tokens=lax.dynamic_update_slice(state.new_tokens, column, (0, state.step)),
        last_token=token,
        position=state.position + 1,
        counts=state.counts + counted,
        stopped=stopped,
        seen=state.seen.at[rows, token].set(True),
        active=state.active,
        cache=state.cache,
    )


def _tokens_of_prompts(tokens: Array, lengths: Array, vocab_size: int) -> Array:
    """Which tokens of the vocabulary occur in each prompt, `[B, V]`."""
    batch, padded = tokens.shape
    in_prompt = jnp.arange(padded) < lengths[:, None]  # [B, T]
    seen = jnp.zeros((batch, vocab_size), bool)
    rows = jnp.arange(batch)[:, None]
    # max, not set: the padding (False) may have the id of a token in the prompt (True).
    return seen.at[rows, tokens].max(in_prompt)


def shard_rows(x: Array, mesh: Mesh | None) -> Array:
    """x with its rows sharded over the mesh, if their number is divisible by that of the shards."""
    if mesh is None:
        return x
    if x.shape[0] % row_shards(mesh) != 0:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(TEXT_AXES)))


def row_shards(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch are split into."""
    if mesh is None:
        return 1
    return devices_along(TEXT_AXES, mesh.shape)


def replicate(x: Array, mesh: Mesh | None) -> Array:
    """x in full on every device of the mesh."""
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
