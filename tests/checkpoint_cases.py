"""A small random model, saved and modified, for the tests of checkpoints and adapter folders."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import CausalLM, LoadedModel, Model, abstract_params
from lorax_ft.tree import flatten, from_modules, modules, unflatten

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
CONFIG = decoder_config(HF_CONFIG, source="these tests")
TOKENS = jnp.arange(24).reshape(2, 12) % 40


def random_model(*, tied: bool = False, seed: int = 0) -> Model:
    config = dataclasses.replace(CONFIG, tied=tied)
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = leaf.shape in [(16,), (3, 16)]  # norm weights are near 1
        return jnp.asarray(rng.normal(is_norm, 0.3, leaf.shape), jnp.float32)

    params = jax.tree.map(draw, abstract_params(config))
    return LoadedModel(config=config, params=params, hf_config=HF_CONFIG)


def saved_model(folder: Path, *, tied: bool = False) -> Model:
    model = random_model(tied=tied)
    save_model(folder, model.params, model)
    return load_model(folder)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: DecoderConfig, params: dict) -> jax.Array:
    return CausalLM(config=config).apply({"params": params}, TOKENS)


def moved(params: dict, seed: int = 1) -> dict:
    """The parameters with random factors and magnitudes."""
    rng = np.random.default_rng(seed)
    trained = ("lora_a", "lora_b", "magnitude")
    flat = flatten(params)
    return unflatten(
        {
            path: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
            if path.endswith(trained)
            else leaf
            for path, leaf in flat.items()
        }
    )


def randomized(params: dict, seed: int = 1) -> dict:
    """The tree with random factors and magnitudes; the padding stays zero."""
    rng = np.random.default_rng(seed)
    layers = modules(params)
    for layer in layers.values():
        if "lora_a" in layer:
            used = (layer["lora_a"] != 0).any(-2) | (layer["lora_b"] != 0).any(-1)
            a, b = (
                jnp.asarray(rng.normal(0, 0.3, layer[n].shape), jnp.float32)
                for n in ("lora_a", "lora_b")
            )
            layer |= {
                "lora_a": jnp.where(used[..., None, :], a, 0),
                "lora_b": jnp.where(used[..., None], b, 0),
            }
        if "magnitude" in layer:
            layer["magnitude"] *= jnp.where(layer["lora_scale"][..., None] > 0, 1.3, 1.0)
    return from_modules(layers)


def assert_trees_equal(got: dict, expected: dict) -> None:
    got, expected = flatten(got), flatten(expected)
    assert sorted(got) == sorted(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)
