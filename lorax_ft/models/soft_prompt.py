"""The soft prompt of a decoder: where its leaves lie, and what they start from.

Shapes: V virtual tokens, D width, L layers, P layers of a period, K key/value heads, C channels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import PromptConfig
from lorax_ft.models.cache import Cache, empty_cache
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import LAYERS, TABLE, CausalLM
from lorax_ft.schema import is_soft_prompt
from lorax_ft.soft_prompts.door import KEY, PROMPT, VALUE, virtual_tokens
from lorax_ft.soft_prompts.encoder import (
    initial_encoder,
    prefix_encoder_shapes,
    prompt_encoder_shapes,
)
from lorax_ft.tree import Layer, Tree, combine, join, member, split, unflatten

PROMPT_DOOR = "soft_prompt"
PREFIX_STD = 0.02  # of keys and values that start at random


def add_soft_prompt(params: Tree, config: PromptConfig, model: CausalLM, *, key: Array) -> Tree:
    """The parameters with the leaves of a soft prompt at the model's doors.

    It acts on virtual tokens, whose ids follow the vocabulary (`virtual_ids`): training data get
    them by `load_data`, and `generate` and the evaluations put them before each text.

    Args:
      params: the model's, with or without adapters.
      config: the kind, its size, and what it starts from.
      model: the decoder, with the tokenizer if it starts from a text.
      key: for random starts.

    Returns:
      A new tree. Prompt: `soft_prompt/prompt_embedding` `[V, D]`, the embeddings behind any scale.
      Prefix: `layers/self_attn/prefix/prefix_key` and `prefix_value` `[L, V, K, C]`, the keys
      behind the rotation. With an encoder, its leaves are there instead.

    Raises:
      ValueError: the kind is none, the tree has a soft prompt already, the text has no tokens, or
        the model's layers have no keys, or not all the same.
    """
    if config.kind == "none":
        raise ValueError("prompt.kind is none; give prompt or prefix")
    if virtual_tokens(params):
        raise ValueError("the parameters have a soft prompt already")
    if config.kind == "prompt":
        return combine(params, {PROMPT_DOOR: _prompt(params, config, model, key)})
    _check_keys(model.config, config)
    return combine(params, _prefix(params, config, model, key))


def soft_prompt_of(params: Tree) -> tuple[Tree, Tree]:
    """The leaves of the soft prompt, and all others."""
    return split(params, is_soft_prompt)


def prefix_doors(config: DecoderConfig) -> list[str]:
    """The paths of the doors at which keys and values pass: one, or one for each of P layers."""
    if config.period == 1:
        return [f"{LAYERS}/self_attn/prefix"]
    places = range(config.period)
    return [f"{LAYERS}/{member(place, config.period)}/self_attn/prefix" for place in places]


def _prompt(params: Tree, config: PromptConfig, model: CausalLM, key: Array) -> Layer:
    c = model.config
    if config.encoder != "none":
        shapes = prompt_encoder_shapes(
            config.encoder,
            tokens=config.virtual_tokens,
            width=c.width,
            hidden=config.encoder_width or c.width,
        )
        return initial_encoder(shapes, key)
    table = params[TABLE]["embedding"]
    if config.init == "random":
        std = jnp.std(table.astype(jnp.float32)) * c.embedding_scale
        return {PROMPT: std * jax.random.normal(key, (config.virtual_tokens, c.width))}
    rows = table[jnp.asarray(_start_tokens(config, model, key))].astype(jnp.float32)
    return {PROMPT: rows * c.embedding_scale}


def _prefix(params: Tree, config: PromptConfig, model: CausalLM, key: Array) -> Tree:
    c = model.config
    doors = prefix_doors(c)
    count = config.virtual_tokens
    if config.encoder != "none":
        heads = c.heads_of(c.each_layer[0])
        shapes = prefix_encoder_shapes(
            tokens=count,
            hidden=config.encoder_width or c.width,
            layers=c.layers,
            heads=heads.count,
            channels=heads.dim,
        )
        leaves = initial_encoder(shapes, key)
        return unflatten({join(doors[0], name): leaf for name, leaf in leaves.items()})
    if config.init == "random":
        return _random_prefix(c, count, key)
    tokens = _start_tokens(config, model, key)
    return _prefix_of_cache(_cache_of(params, tokens[None], config=c), c)


def _random_prefix(config: DecoderConfig, count: int, key: Array) -> Tree:
    """A prefix of small keys and values."""
    shapes = jax.eval_shape(lambda: _prefix_of_cache(empty_cache(config, 1, count), config))
    leaves, structure = jax.tree.flatten(shapes)
    drawn: list[Array] = []
    for i, leaf in enumerate(leaves):
        own = jax.random.fold_in(key, i)
        drawn.append(PREFIX_STD * jax.random.normal(own, leaf.shape))
    prefix: Tree = jax.tree.unflatten(structure, drawn)
    return prefix


def _prefix_of_cache(cache: Cache, config: DecoderConfig) -> Tree:
    """The leaves `[L / P, V, K, C]` of a prefix that is the cache `[L / P, 1, K, V, C]`."""
    leaves: dict[str, Any] = {}
    for place, door in enumerate(prefix_doors(config)):
        own = cache if config.period == 1 else cache[member(place, config.period)]
        for name, part in ((KEY, "k"), (VALUE, "v")):
            leaves[join(door, name)] = own[part][:, 0].swapaxes(1, 2).astype(jnp.float32)
    return unflatten(leaves)


@functools.partial(jax.jit, static_argnames="config")
def _cache_of(params: Tree, tokens: Array, *, config: DecoderConfig) -> Cache:
    """The keys and values of tokens `[1, V]`."""
    model = CausalLM(config=config)
    empty = empty_cache(config, *tokens.shape)
    _, cache = model.features(params, tokens, cache=empty)
    assert cache is not None
    return cache


def _start_tokens(config: PromptConfig, model: CausalLM, key: Array) -> np.ndarray:
    """The tokens that a soft prompt starts from, `[V]`."""
    count = config.virtual_tokens
    if config.text is None:
        drawn = jax.random.randint(key, (count,), 0, model.config.vocab_size)
        return np.asarray(drawn, np.int32)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("prompt.init text needs a tokenizer, which the model has not")
    ids = tokenizer(config.text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt.text {config.text!r} has no tokens")
    return np.resize(np.asarray(ids, np.int32), count)  # repeated or cut


def _check_keys(config: DecoderConfig, prompt: PromptConfig) -> None:
    """Raise where a prefix has no keys to stand before."""
    if any(layer_type.linear for layer_type in config.each_layer):
        raise ValueError(
            "prompt.kind prefix puts keys before those of each layer, and some layers of this "
            "model have linear attention, which has none; use prompt.kind prompt"
        )
    if prompt.encoder != "none" and config.period > 1:
        raise ValueError(
            f"prompt.encoder {prompt.encoder} makes keys and values of all layers at once, and "
            "the layers of this model are not all alike; use prompt.encoder none"
        )
