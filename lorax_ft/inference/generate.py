"""Tokens from a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.inference.decode import SamplingParams, extend, prefill
from lorax_ft.inference.sampling import Sampling
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, combine, flatten, split

GREEDY = Sampling()
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)


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
    """Continues prompts, all in one batch.

    Two programs are compiled for each number of prompts and each length of the padded prompts and of
    `max_new_tokens`, both rounded up (`bucket`); sampling with any numbers is another two.

    Args:
      model: gives the decoder's config, and the stop ids where none are given.
      params: parameters, with or without adapters, on one device or on a mesh.
      prompts: token ids, of any lengths above 0.
      max_new_tokens: the longest continuation.
      sampling: how a token is chosen.
      stop_ids: tokens that end a row; None takes `default_stop_ids`.
      key: for drawing. What a row draws depends on the key and its index, not on the other rows.

    Returns:
      The new tokens of each row, up to its first stop id, which is left out.

    Raises:
      ValueError: a prompt is empty, is no text of this vocabulary, or is too long for the model's positions; a
        number is out of range; or sampling lacks its key.
    """
    n = max_new_tokens
    *_, rows = stream(
        model,
        params,
        prompts,
        max_new_tokens=n,
        chunk=n,
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
    """`generate`, a few tokens at a time.

    Args:
      model: as for `generate`, and so is all that is not named here.
      chunk: new tokens between two results; any number is the same program.

    Yields:
      The new tokens of each row so far, up to its first stop id; the last result is what `generate` returns.
    """
    check_prompts(prompts, max_new_tokens, model.config)
    if sampling.temperature > 0 and key is None:
        raise ValueError(
            f"at temperature {sampling.temperature} tokens are drawn, which needs key=jax.random.key(seed)"
        )
    if not len(prompts):
        yield []
        return
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    stop = np.array(default_stop_ids(model) if stop_ids is None else stop_ids, np.int32)
    mesh = _mesh(params)
    key = jax.random.key(0) if key is None else key
    draw = SamplingParams(
        temperature=np.float32(sampling.temperature or 1),
        top_k=np.int32(min(sampling.top_k or model.config.vocab_size, model.config.vocab_size)),
        top_p=np.float32(math.inf if sampling.top_p is None else sampling.top_p),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        stop=np.pad(stop, (0, bucket(len(stop) or 1) - len(stop)), constant_values=-1),
        key=_everywhere(key, mesh) if mesh else key,
        length=jnp.asarray(lengths + max_new_tokens),
    )
    config = dataclasses.replace(
        model.config, attention="xla"
    )  # a single query is not a case for cuDNN's kernel
    params, greedy = with_all_norms(params), sampling.temperature == 0
    room = bucket(max_new_tokens)
    state = prefill(
        params, tokens, lengths, draw, config=config, room=room, greedy=greedy, mesh=mesh
    )
    for until in [*range(chunk, max_new_tokens, chunk), max_new_tokens]:
        state = extend(
            params, state, np.int32(until), draw, config=config, greedy=greedy, mesh=mesh
        )
        out, counts, stopped = (np.asarray(x) for x in (state.out, state.counts, state.stopped))
        yield [row[:count].tolist() for row, count in zip(out, counts, strict=True)]
        if stopped.all():
            return


def default_stop_ids(model: Model) -> tuple[int, ...]:
    """The ends of text by tokenizer, config.json and generation_config.json, and the usual ones in the vocabulary."""
    ids: set[int | None] = set()
    for configured in (c.get("eos_token_id") for c in (model.hf_config, model.generation_config)):
        ids |= set(configured if isinstance(configured, list | tuple) else [configured])
    if model.tokenizer is not None:
        added = model.tokenizer.get_added_vocab()
        ids |= {model.tokenizer.eos_token_id, *(added.get(token) for token in END_OF_TURN)}
    return tuple(sorted(i for i in ids if i is not None))


def check_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    config: DecoderConfig,
    *,
    where: Sequence[str] | None = None,
) -> None:
    """Raise ValueError where a prompt cannot be continued; `where` names the place of each, and None counts them."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be above 0")
    for i, prompt in enumerate(prompts):
        place = where[i] if where else f"prompt {i + 1}"
        if len(prompt) == 0:
            raise ValueError(f"{place} holds no token")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"{place}: {len(prompt)} tokens and max_new_tokens {max_new_tokens} are more than the "
                f"{config.max_positions} positions of the model; shorten one of them"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"{place} holds the token {max(prompt, key=abs)}; the vocabulary holds {config.vocab_size}"
            )


def bucket(length: int) -> int:
    """`length` rounded up, so that few lengths are compiled: a power of two from 32 to 256, then multiples of 256.

    >>> [bucket(n) for n in (1, 33, 256, 700)]
    [32, 64, 256, 768]
    """
    return (
        max(32, 2 ** math.ceil(math.log2(length)))
        if length <= 256
        else math.ceil(length / 256) * 256
    )


def with_all_norms(params: Tree) -> Tree:
    """The parameters with DoRA's norms, computed unless they stand there; for many calls with the same adapter."""
    paths = flatten(params)
    if all(
        f"{path.removesuffix('magnitude')}norm" in paths
        for path in paths
        if path.endswith("/magnitude")
    ):
        return params
    without, _ = split(params, lambda path: not path.endswith("/norm"))
    return combine(without, _norms(without))


@jax.jit
def _norms(params: Tree) -> Tree:
    return split(with_norms(params), lambda path: path.endswith("/norm"))[0]


def _everywhere(key: Array, mesh: Mesh) -> Array:
    """The key on every device of the mesh; device_put cannot place a key on devices of other processes (jax 0.10)."""
    data, sharding = np.asarray(jax.random.key_data(key)), NamedSharding(mesh, P())
    placed = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(key))


def _mesh(params: Tree) -> Mesh | None:
    """The mesh that the parameters lie on, or None where they lie on one device."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)
