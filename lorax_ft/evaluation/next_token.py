"""Log-probabilities of the token after each of many prompts.

Prompts of a group, such as the questions of a subject after the same shots, start alike. What they
share is computed once, and its cache serves all of them; the head sees only their last tokens.

Letters: B rows of a batch, T tokens of a padded row, S slots of the cache, K targets of a prompt,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lorax_ft.inference.decode import replicate, row_shards, shard_rows
from lorax_ft.inference.generate import (
    check_prompts,
    mesh_of,
    with_all_norms,
    with_virtual_tokens,
)
from lorax_ft.lowrank.activation import INVOCATION
from lorax_ft.models.cache import Cache, empty_cache, with_slots
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import CausalLM, Model
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Tree

BATCH_TOKENS = 2048
"""Tokens of a batch on a device. A CPU's matrix products are efficient from about 1,024 rows on, so
more would not make it faster."""
SHORTEST_SHARED = 32
"""A shared start of fewer tokens is not worth a cache."""


class NextTokens(NamedTuple):
    """What follows each prompt."""

    log_probs: np.ndarray
    """The log-probability of each target, `[N, K]` float32."""
    best: np.ndarray
    """The most likely token, `[N]`."""


class Batch(NamedTuple):
    """Rows that are computed at once."""

    rows: list[int]
    """The index of each row."""
    size: int
    """B, which counts the rows that pad the batch too."""
    width: int
    """T."""


def next_tokens(
    model: Model,
    params: Tree,
    prompts: Sequence[np.ndarray],
    targets: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda count: None,
) -> NextTokens:
    """Computes the log-probabilities of tokens after prompts.

    JAX compiles a program for each padded length of a group's shared start and of the rest, which
    are few (see `padded`).

    Args:
      model: provides the decoder's config.
      params: parameters, with or without adapters, on one device or sharded over a mesh.
      prompts: token ids, at least one each.
      targets: token ids, `[N, K]`.
      groups: the group of each prompt; the prompts of a group share their common start. None
        shares nothing.
      batch_tokens: tokens of a batch on each device that has rows of its own.
      advance: called with the number of prompts that were computed.

    Raises:
      ValueError: a prompt is empty, too long for the model's positions, or has token ids outside
        the vocabulary.
    """
    # A prompt may take all positions: the token after it is not an input.
    config = dataclasses.replace(model.config, max_positions=model.config.max_positions + 1)
    check_prompts(prompts, 1, config, virtual=virtual_tokens(params))
    prompts = with_virtual_tokens(prompts, params, config)
    params = with_all_norms(model, params)
    mesh = mesh_of(params)
    log_probs = np.zeros(targets.shape, np.float32)
    best = np.zeros(len(prompts), np.int32)
    for members in _members(groups, len(prompts)):
        own = [prompts[i] for i in members]
        shared, cache = 0, None
        if groups is not None:
            shared, cache = _read_start(model, params, own, mesh)
        lengths = np.array([len(prompt) - shared for prompt in own])
        for batch in batches_of(lengths, batch_tokens, shards=row_shards(mesh)):
            rows = [members[i] for i in batch.rows]
            rests = [own[i][shared:] for i in batch.rows]
            arrays = _arrays(rests, targets[rows], batch)
            scores, first = _score(
                params,
                cache,
                *arrays,
                np.int32(shared),
                config=model.config,
                mesh=mesh,
            )
            # Without the rows that pad the batch.
            log_probs[rows] = np.asarray(scores)[: len(rows)]
            best[rows] = np.asarray(first)[: len(rows)]
            advance(len(rows))
    return NextTokens(log_probs, best)


def shared_length(prompts: Sequence[np.ndarray], config: DecoderConfig) -> int:
    """The tokens that prompts start with and that are computed once; 0 if sharing is not worth it.

    At least one token of each prompt is left.
    """
    if len(prompts) < 2:
        return 0
    # The last token is left for the head to see.
    length = min(len(prompt) for prompt in prompts) - 1
    first = np.asarray(prompts[0])
    for prompt in prompts[1:]:
        differs = np.flatnonzero(first[:length] != np.asarray(prompt)[:length])
        if len(differs):
            length = int(differs[0])
    if length < SHORTEST_SHARED or _straddles(prompts, config):
        return 0
    return length


def padded(length: int, *, steps: int = 4) -> int:
    """`length` rounded up to one of so many lengths between each two powers of 2; at least 16.

    >>> [padded(n) for n in (1, 17, 129, 161, 300)]
    [16, 20, 160, 192, 320]
    >>> padded(129, steps=2)
    192
    """
    # The largest power of 2 up to `length`: the step is a part of it.
    power = 16
    while 2 * power <= length:
        power *= 2
    part = power // steps
    steps_up = -(-length // part)  # rounded up
    return max(16, steps_up * part)


def _members(groups: Sequence[Hashable] | None, count: int) -> list[list[int]]:
    """The indices of each group."""
    if groups is None:
        return [list(range(count))] if count else []
    found: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return list(found.values())


def _straddles(prompts: Sequence[np.ndarray], config: DecoderConfig) -> bool:
    """Whether the frequencies of longrope (2402.13753) are not the same for all prompts."""
    lengths = [len(prompt) for prompt in prompts]
    for layer_type in config.each_layer:
        rope = layer_type.rope
        if rope is None or rope.scaling != "longrope":
            continue
        if min(lengths) <= rope.original_positions < max(lengths):
            return True
    return False


def batches_of(lengths: np.ndarray, batch_tokens: int, *, shards: int) -> Iterator[Batch]:
    """Yields batches of rows of like length, the longest first: memory runs out at once or never.

    Args:
      lengths: tokens of each row, `[N]`.
      batch_tokens: B T of each shard, if a row is not longer.
      shards: into how many parts the rows of a batch are split.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    start = 0
    while start < len(order):
        # Its first row is the longest one of a batch.
        width = padded(int(lengths[order[start]]))
        size = shards * max(batch_tokens // width, 1)
        yield Batch(order[start : start + size], size, width)
        start += size


def _arrays(
    rests: Sequence[np.ndarray], targets: np.ndarray, batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens `[B, T]`, lengths `[B]` and targets `[B, K]`; the rows behind the last have a token.

    One size for all batches of a width: another size would compile another program.
    """
    tokens = np.zeros((batch.size, batch.width), np.int32)
    lengths = np.ones(batch.size, np.int32)
    all_targets = np.zeros((batch.size, targets.shape[1]), np.int32)
    for i, rest in enumerate(rests):
        tokens[i, : len(rest)] = rest
        lengths[i] = len(rest)
    all_targets[: len(targets)] = targets
    return tokens, lengths, all_targets


def _read_start(
    model: Model, params: Tree, prompts: Sequence[np.ndarray], mesh: Mesh | None
) -> tuple[int, Cache | None]:
    """The number of tokens that the prompts share, and their cache; 0 and None: not worth it."""
    shared = shared_length(prompts, model.config)
    # Whether an activated LoRA acts in the rest depends on the start.
    if not shared or INVOCATION in params:
        return 0, None
    # Padded more coarsely than the rest: each length makes programs for all lengths of the rest.
    tokens = np.zeros((1, padded(shared, steps=2)), np.int32)
    tokens[0, :shared] = prompts[0][:shared]
    # longrope chooses its frequencies by the length of the whole prompt.
    longest = max(len(prompt) for prompt in prompts)
    count = np.array([shared], np.int32)
    length = np.array([longest], np.int32)
    cache = _prefill(params, tokens, count, length, config=model.config, mesh=mesh)
    return shared, cache


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _prefill(
    params: Tree,
    tokens: Array,
    count: Array,
    length: Array,
    *,
    config: DecoderConfig,
    mesh: Mesh | None,
) -> Cache:
    """The cache `[L, 1, T, ...]` of tokens `[1, T]`, of which the first `count` are no padding."""
    cache: Cache | None = empty_cache(config, 1, tokens.shape[1])
    model = CausalLM(config=config)
    _, cache = model.features(params, tokens, cache=cache, length=length, counts=count)
    assert cache is not None
    return jax.tree.map(lambda leaf: replicate(leaf, mesh), cache)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _score(
    params: Tree,
    cache: Cache | None,
    tokens: Array,
    lengths: Array,
    targets: Array,
    start: Array,
    *,
    config: DecoderConfig,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Log-probabilities `[B, K]` of the targets, and the most likely tokens `[B]`.

    Args:
      params: parameters, with DoRA's norms.
      cache: of the tokens before, which all rows share; None: there are none.
      tokens: `[B, T]`, padded on the right.
      lengths: `[B]`, tokens of each row before its padding.
      targets: `[B, K]`.
      start: the number of tokens before.
      config: the decoder's.
      mesh: the mesh that the parameters are sharded over, or None.
    """
    model = CausalLM(config=config)
    tokens, lengths = shard_rows(tokens, mesh), shard_rows(lengths, mesh)
    width = tokens.shape[1]
    positions = None
    if cache is not None:
        # Room for the rows' own tokens behind those that they share.
        cache = with_slots(cache, width)
        positions = jnp.broadcast_to(start + jnp.arange(width), tokens.shape)
    features, _ = model.features(
        params,
        tokens,
        positions,
        cache=cache,
        length=start + lengths,
        counts=lengths,
    )
    index = (lengths - 1)[:, None, None]  # [B, 1, 1]
    last = jnp.take_along_axis(features, index, axis=1)[:, 0]  # [B, D]
    # All of the vocabulary, for the sum that makes probabilities of the logits.
    logits = model.logits(params, last).astype(jnp.float32)  # [B, V]
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, targets, axis=1)
    best = jnp.argmax(logits, axis=1)
    return replicate(chosen, mesh), replicate(best, mesh)
