"""Rotary embeddings in GGUF files: their keys, and the tensors that divide each frequency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.models.rope import Rope, frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of Llama 3.1 to 3.3, without their factor.

GGUF has no keys for them: llama.cpp stores only the divisors that follow from them, `rope_freqs`.
"""
FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
YARN_KEYS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
ROPE_KEYS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    *YARN_KEYS,
}


def read_rope(metadata: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the `rope_parameters` of config.json; `name` is the architecture's prefix of the keys.

    Raises:
      ValueError: the scaling is not supported.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{name}.rope.{key}", default)

    head_dim = metadata[f"{name}.attention.key_length"]
    dims = get("dimension_count", head_dim)
    scaling = get("scaling.type", "none")
    attention_factor = get("scaling.attn_factor", 1)
    original = get("scaling.original_context_length", metadata[f"{name}.context_length"])
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(get("freq_base", 10000.0)),
    }
    if dims != head_dim:
        parameters["partial_rotary_factor"] = dims / head_dim
    # These tensors are the factors of longrope, whatever `scaling.type` says.
    if SHORT in tensors:
        return parameters | _longrope(tensors[SHORT], tensors[LONG], attention_factor, original)
    known = scaling in ("none", "linear", "yarn")
    scaled_twice = FACTORS in tensors and scaling != "none"
    if attention_factor != 1 or not known or scaled_twice:
        raise ValueError(
            f"has the rotary scaling {scaling} with the attention factor {attention_factor}, "
            "which is not supported; use the Hugging Face folder instead"
        )
    if FACTORS in tensors:
        return parameters | _from_divisors(parameters["rope_theta"], tensors[FACTORS], original)
    if scaling == "none":
        return parameters
    parameters["rope_type"] = scaling
    parameters["factor"] = float(get("scaling.factor", 1.0))
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = original
        for key, beta in YARN_KEYS.items():
            if metadata.get(f"{name}.{key}") is not None:
                parameters[beta] = metadata[f"{name}.{key}"]
    return parameters


def write_rope(rope: Rope) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a rotary embedding's keys, without the architecture's prefix, and its tensors."""
    keys: dict[str, Any] = {"rope.dimension_count": rope.dims, "rope.freq_base": rope.theta}
    if rope.scaling in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope.scaling
        keys["rope.scaling.factor"] = rope.factor
    if rope.scaling in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope.original_positions
    if rope.scaling == "yarn":
        keys["rope.scaling.yarn_beta_fast"] = float(rope.high)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.low)
    if rope.scaling == "llama3":
        return keys, {FACTORS: divisors(rope)}
    if rope.scaling != "longrope":
        return keys, {}
    # One set of factors without a magnitude is how `_from_divisors` reads `rope_freqs` that are
    # not those of Llama 3, so it goes back into that tensor.
    if rope.short_factors == rope.long_factors and rope.magnitude == 1:
        return keys, {FACTORS: divisors(rope)}
    keys["rope.scaling.attn_factor"] = rope.magnitude
    short = np.array(rope.short_factors, np.float32)
    long = np.array(rope.long_factors, np.float32)
    return keys, {SHORT: short, LONG: long}


def divisors(rope: Rope, *, position: int = 0) -> np.ndarray:
    """Returns what divides each frequency, `[dims / 2]`, in texts that end at `position`."""
    unscaled = dataclasses.replace(rope, scaling="none")
    positions = jnp.full((1, 1), position)
    ratio = frequencies(unscaled, positions) / frequencies(rope, positions)
    return np.asarray(ratio, np.float32)


def _from_divisors(theta: float, factors: np.ndarray, original: int) -> dict[str, Any]:
    """Returns Llama 3's parameters if they give these divisors; otherwise longrope's."""
    # llama3 divides the lowest frequency by the whole factor, so the largest divisor is the factor.
    llama3 = LLAMA3 | {"factor": round(float(np.max(factors)), 4)}
    rope = Rope(
        dims=2 * len(factors),
        theta=theta,
        scaling="llama3",
        factor=llama3["factor"],
        original_positions=8192,
        low=llama3["low_freq_factor"],
        high=llama3["high_freq_factor"],
    )
    if np.allclose(divisors(rope), factors, rtol=1e-4):
        return {"rope_type": "llama3", **llama3}
    return _longrope(factors, factors, 1.0, original)


def _longrope(
    short: np.ndarray,
    long: np.ndarray,
    attention_factor: float,
    original: int,
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [float(factor) for factor in short],
        "long_factor": [float(factor) for factor in long],
        "attention_factor": float(attention_factor),
        "original_max_position_embeddings": original,
    }
