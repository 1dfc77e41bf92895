"""A small checkpoint's config and a model comparison, for the NF4 and quantized-run tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.models.model import Model

# 24 is not a multiple of the block size: blocks cross rows, and some kernels end with a partial or
# an odd block.
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
TOKENS = jnp.arange(24).reshape(2, 12) % 40


def logits(model: Model, params: dict | None = None) -> np.ndarray:
    return np.asarray(model.apply({"params": model.params if params is None else params}, TOKENS))


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
