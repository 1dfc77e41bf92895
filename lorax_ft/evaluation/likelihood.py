"""Log-probabilities of the tokens of texts, and from them the loss and the perplexity.

Letters: B rows of a batch, T tokens of a padded row, V vocabulary, N chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from lorax_ft.data.chat import Sample
from lorax_ft.evaluation.next_token import BATCH_TOKENS, batches_of
from lorax_ft.inference.decode import replicate, row_shards, shard_rows
from lorax_ft.inference.generate import (
    mesh_of,
    text_positions,
    with_all_norms,
    with_virtual_tokens,
)
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import CausalLM, Model
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Tree

CHUNK_ROWS = 1024
"""Tokens whose logits exist at once."""


class TokenScores(NamedTuple):
    """How likely each token of a text is after those before it; the first one has no score."""

    log_probs: np.ndarray
    """`[T − 1]` float32."""
    greedy: np.ndarray
    """Whether each token is the most likely one, `[T − 1]`."""


class RowLosses(NamedTuple):
    """The losses of rows."""

    sums: np.ndarray
    """The summed loss of the labeled tokens of each row, `[N]` float64."""
    tokens: np.ndarray
    """The number of labeled tokens, `[N]`."""


def row_losses(
    model: Model,
    params: Tree,
    samples: Sequence[Sample],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda count: None,
) -> RowLosses:
    """Computes the cross-entropy of the labeled tokens of each sample, in nats.

    Args:
      model: provides the decoder's config.
      params: parameters, with or without adapters.
      samples: tokens, and which of them count.
      batch_tokens: tokens of a batch on each device.
      advance: called with the number of samples that were computed.
    """
    texts = [sample.tokens for sample in samples]
    scores = token_scores(model, params, texts, batch_tokens=batch_tokens, advance=advance)
    sums, counts = [], []
    for sample, score in zip(samples, scores, strict=True):
        # The first token has no score, as nothing is before it.
        labeled = np.asarray(sample.mask[1:], bool)
        sums.append(-score.log_probs[labeled].sum(dtype=np.float64))
        counts.append(labeled.sum())
    return RowLosses(np.array(sums), np.array(counts, np.float64))


def token_scores(
    model: Model,
    params: Tree,
    texts: Sequence[np.ndarray],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda count: None,
) -> list[TokenScores]:
    """Computes the log-probability of each token after those before it.

    Args:
      model: provides the decoder's config.
      params: parameters, with or without adapters, on one device or sharded over a mesh.
      texts: token ids.
      batch_tokens: tokens of a batch on each device.
      advance: called with the number of texts that were computed.

    Raises:
      ValueError: a text is longer than the model's positions.
    """
    virtual = virtual_tokens(params)
    positions = text_positions(params, model.config)
    for number, text in enumerate(texts, 1):
        # The last token is not an input.
        if len(text) > positions + 1:
            room = f"{positions} positions" + (" beside its soft prompt" if virtual else "")
            raise ValueError(f"text {number} has {len(text)} tokens, but the model has {room}")
    texts = with_virtual_tokens(texts, params, model.config)
    params = with_all_norms(model, params)
    mesh = mesh_of(params)
    scores: list[TokenScores] = [TokenScores(np.zeros(0), np.zeros(0, bool))] * len(texts)
    # Of the inputs; a text of one token has none, but its row must not be empty.
    lengths = np.array([max(len(text) - 1, 1) for text in texts])
    for batch in batches_of(lengths, batch_tokens, shards=row_shards(mesh)):
        shape = (batch.size, batch.width)
        inputs = np.zeros(shape, np.int32)
        targets = np.zeros(shape, np.int32)
        # The rows that pad the batch count as one token: none would leave nothing to attend to.
        counts = np.ones(batch.size, np.int32)
        for row, i in enumerate(batch.rows):
            count = len(texts[i]) - 1
            inputs[row, :count] = texts[i][:-1]
            targets[row, :count] = texts[i][1:]
            counts[row] = lengths[i]
        found = _token_scores(params, inputs, targets, counts, config=model.config, mesh=mesh)
        log_probs, greedy = jax.device_get(found)
        for row, i in enumerate(batch.rows):
            # The first token has no score, with a soft prompt before it or without one.
            own = slice(virtual, len(texts[i]) - 1)
            scores[i] = TokenScores(log_probs[row, own], greedy[row, own])
        advance(len(batch.rows))
    return scores


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _token_scores(
    params: Tree,
    inputs: Array,
    targets: Array,
    counts: Array,
    *,
    config: DecoderConfig,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Log-probabilities of the targets `[B, T]`, and whether each is the most likely token.

    The logits of a chunk of tokens exist at a time.
    """
    model = CausalLM(config=config)
    inputs, counts = shard_rows(inputs, mesh), shard_rows(counts, mesh)
    features, _ = model.features(params, inputs, length=counts, counts=counts)
    head = model.head(params)
    batch, width = targets.shape
    # The logits of all tokens at once, `[B, T, V]`, would take gigabytes for a large vocabulary.
    chunks = min(math.ceil(batch * width / CHUNK_ROWS), width)
    padding = -width % chunks

    def chunked(x: Array) -> Array:
        """`[B, T, ...]` as chunks `[N, B, T / N, ...]`."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, padding)
        x = jnp.pad(x, widths)
        by_chunk = x.reshape(batch, chunks, -1, *x.shape[2:])
        return jnp.moveaxis(by_chunk, 1, 0)

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        features, targets = chunk
        logits = model.score(head, features).astype(jnp.float32)  # [B, T / N, V]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # As log_softmax, without the log-probabilities of the other tokens.
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        greedy = jnp.argmax(logits, axis=-1) == targets
        return log_probs, greedy

    scores = lax.map(score, (chunked(features), chunked(targets)))

    def joined(x: Array) -> Array:
        """Chunks `[N, B, T / N]` as `[B, T]`."""
        by_row = jnp.moveaxis(x, 0, 1)
        rows = by_row.reshape(batch, -1)
        return replicate(rows[:, :width], mesh)

    log_probs, greedy = scores
    return joined(log_probs), joined(greedy)
