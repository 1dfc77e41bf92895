"""Generation from token ids to token ids."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.inference.decode import DecodeState, SamplingParams, decode, prefill
from lorax_ft.inference.sampling import Sampling
from lorax_ft.interop.end_tokens import ids_that_stop
from lorax_ft.lowrank.adapters import norms
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import CausalLM, Model, decoder_layout
from lorax_ft.soft_prompts.door import virtual_ids, virtual_tokens
from lorax_ft.soft_prompts.encoder import encoded
from lorax_ft.tree import Tree, combine

GREEDY = Sampling()


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    key: Array | None = None,
) -> list[list[int]]:
    """Continues the prompts, all in one batch.

    JAX compiles two programs for each combination of batch size, prompt length and `max_new_tokens`
    (the two lengths are rounded up by `bucket`), and two more for sampling instead of greedy
    decoding. New values in `sampling` do not recompile.

    Args:
      model: provides the decoder's config and the default stop ids.
      params: parameters, with or without adapters, on one device or sharded over a mesh.
      prompts: token ids, at least one per prompt.
      max_new_tokens: maximum number of new tokens of each row.
      sampling: how the next token is chosen.
      stop_ids: token ids that end a row; None takes `default_stop_ids`.
      key: random key for sampling. A row's samples depend on the key and the row's index, not on
        the other rows.

    Returns:
      The new tokens of each row, up to its first stop id, without it.

    Raises:
      ValueError: a prompt is empty, has token ids outside the vocabulary, or is too long for the
        model's positions; an option is out of range; or sampling has no key.
    """
    *_, rows = stream(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        chunk=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        key=key,
    )
    return rows


def stream(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    chunk: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    key: Array | None = None,
) -> Iterator[list[list[int]]]:
    """Like `generate`, but yields the tokens as they are generated.

    Args:
      model: this and the other arguments are those of `generate`.
      chunk: number of new tokens between two results; another number does not recompile.

    Yields:
      The new tokens of each row so far, up to its first stop id; the last result is what `generate`
      returns.
    """
    check_prompts(prompts, max_new_tokens, model.config, virtual=virtual_tokens(params))
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature {sampling.temperature} needs key=jax.random.key(seed)")
    if not len(prompts):
        yield []
        return
    tokens, lengths = _pad(with_virtual_tokens(prompts, params, model.config))
    mesh = mesh_of(params)
    sampling_params = _sampling_params(
        sampling,
        vocab_size=model.config.vocab_size,
        stop_ids=default_stop_ids(model) if stop_ids is None else stop_ids,
        key=_replicated_key(key, mesh),
        max_length=jnp.asarray(lengths + max_new_tokens),
    )
    params = with_all_norms(model, params)
    static: dict[str, Any] = {
        # cuDNN's attention is for many queries at once; decoding has one.
        "config": dataclasses.replace(model.config, attention="xla"),
        "greedy": sampling.temperature == 0,
        "mesh": mesh,
    }
    capacity = bucket(max_new_tokens)
    state = prefill(params, tokens, lengths, sampling_params, max_new_tokens=capacity, **static)
    for until in [*range(chunk, max_new_tokens, chunk), max_new_tokens]:
        state = decode(params, state, np.int32(until), sampling_params, **static)
        yield _new_tokens(state)
        if np.asarray(state.stopped).all():
            return


def default_stop_ids(model: Model) -> tuple[int, ...]:
    """The token ids that end a text (see `end_tokens`); `save_model` writes the same ones."""
    return ids_that_stop(model.tokenizer, model.hf_config, model.generation_config)


def check_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    config: DecoderConfig,
    *,
    where: Sequence[str] | None = None,
    virtual: int = 0,
) -> None:
    """Checks that the model can continue every prompt.

    Args:
      prompts: token ids.
      max_new_tokens: maximum number of new tokens of each row.
      config: the decoder's.
      where: the source of each prompt, for errors; None numbers them.
      virtual: virtual tokens of the soft prompt, which are put before each prompt.

    Raises:
      ValueError: a prompt is empty, too long or has token ids outside the vocabulary; or
        max_new_tokens is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be above 0")
    for i, prompt in enumerate(prompts):
        place = where[i] if where else f"prompt {i + 1}"
        if len(prompt) == 0:
            raise ValueError(f"{place} has no tokens")
        length = virtual + len(prompt)
        if length + max_new_tokens > config.max_positions:
            raise ValueError(
                f"{place}: {length} tokens plus max_new_tokens {max_new_tokens} exceed the "
                f"{config.max_positions} positions of the model; shorten the prompt or lower "
                "max_new_tokens"
            )
        # JAX does not raise when it gathers out of range: the text would be silently wrong.
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"{place} has the token id {max(prompt, key=abs)}, but the vocabulary has only "
                f"{config.vocab_size} tokens"
            )


def bucket(length: int) -> int:
    """`length` rounded up, so that few distinct lengths are compiled.

    Up to 256 it is a power of two from 32 on, above that a multiple of 256.

    >>> [bucket(n) for n in (1, 33, 256, 700)]
    [32, 64, 256, 768]
    """
    if length > 256:
        return math.ceil(length / 256) * 256
    return max(32, 2 ** math.ceil(math.log2(length)))


def text_positions(params: Tree, config: DecoderConfig) -> int:
    """The positions that a text may take: the model's, without those of its soft prompt."""
    return config.max_positions - virtual_tokens(params)


def with_virtual_tokens(
    texts: Sequence[Sequence[int] | np.ndarray], params: Tree, config: DecoderConfig
) -> list[np.ndarray]:
    """The token ids of each text, with the virtual tokens of the parameters' soft prompt before."""
    prompt = virtual_ids(virtual_tokens(params), vocab_size=config.vocab_size)
    return [np.concatenate([prompt, np.asarray(text, np.int32)]) for text in texts]


def with_all_norms(model: CausalLM, params: Tree) -> Tree:
    """The parameters with what depends on them alone, and is missing: DoRA's norms, soft prompts.

    `generate` calls this. Call it yourself once before many calls with the same adapter.
    """
    params = encoded(params)
    return combine(params, _norms(params, model.config))


@functools.partial(jax.jit, static_argnames="config")
def _norms(params: Tree, config: DecoderConfig) -> Tree:
    """Only the norms, so that the compiled program does not copy the other parameters."""
    return norms(params, layout=decoder_layout(config))


def _pad(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts padded on the right `[B, T]`, and their lengths `[B]`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _sampling_params(
    sampling: Sampling,
    *,
    vocab_size: int,
    stop_ids: Sequence[int],
    key: Array,
    max_length: Array,
) -> SamplingParams:
    """The options as arrays, where an option that is None becomes a value that has no effect."""
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    # Not 1: rounding can lift the cumulative sum of probabilities to 1 before the last token.
    top_p = math.inf if sampling.top_p is None else sampling.top_p
    # Padded, so that another number of stop ids does not recompile; no token has the id -1.
    padding = bucket(len(stop_ids) or 1) - len(stop_ids)
    return SamplingParams(
        # Greedy decoding ignores the temperature, and 1 avoids a division by 0.
        temperature=np.float32(sampling.temperature or 1),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        stop_ids=np.pad(np.array(stop_ids, np.int32), (0, padding), constant_values=-1),
        key=key,
        max_length=max_length,
    )


def _new_tokens(state: DecodeState) -> list[list[int]]:
    """The new tokens of each row, up to its stop id."""
    new_tokens, counts = np.asarray(state.new_tokens), np.asarray(state.counts)
    return [row[:count].tolist() for row, count in zip(new_tokens, counts, strict=True)]


def _replicated_key(key: Array | None, mesh: Mesh | None) -> Array:
    """The key on every device of the mesh; without a key, one that greedy decoding ignores."""
    if key is None:
        key = jax.random.key(0)
    if mesh is None:
        return key
    # device_put cannot place a typed key on devices of other processes (jax 0.10).
    data, sharding = np.asarray(jax.random.key_data(key)), NamedSharding(mesh, P())
    replicated = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
    return jax.random.wrap_key_data(replicated, impl=jax.random.key_impl(key))


def mesh_of(params: Tree) -> Mesh | None:
    """The mesh that the parameters are sharded over, or None if they are on one device."""
    for leaf in jax.tree.leaves(params):
        # Leaves may also be numpy arrays, which have no sharding.
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        if isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
