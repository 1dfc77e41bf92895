"""Rotary embeddings in GGUF files: keys, and tensors of what divides each frequency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.models.rope import Rope, frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all of Llama 3.1 to 3.3; llama.cpp keeps only what follows from them, in `rope_freqs`."""
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
    """The `rope_parameters` of config.json; `name` is the architecture's, before its keys.

    Raises:
      ValueError: a stretch that is not supported.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{name}.rope.{key}", default)

    head_dim = metadata[f"{name}.attention.key_length"]
    dims, kind, attention = (
        get("dimension_count", head_dim),
        get("scaling.type", "none"),
        get("scaling.attn_factor", 1),
    )
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(get("freq_base", 10000.0)),
    }
    if dims != head_dim:
        parameters["partial_rotary_factor"] = dims / head_dim
    original = get("scaling.original_context_length", metadata[f"{name}.context_length"])
    if SHORT in tensors:
        return parameters | _by_channel(tensors[SHORT], tensors[LONG], attention, original)
    if (
        attention != 1
        or kind not in ("none", "linear", "yarn")
        or (FACTORS in tensors and kind != "none")
    ):
        raise ValueError(
            f"has the rotary scaling {kind} with the factor {attention} of attention, which is not read"
        )
    if FACTORS in tensors:
        return parameters | _recovered(parameters["rope_theta"], tensors[FACTORS], original)
    if kind == "none":
        return parameters
    parameters |= {"rope_type": kind, "factor": float(get("scaling.factor", 1.0))}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = original
        betas = {theirs: metadata.get(f"{name}.{key}") for key, theirs in YARN_KEYS.items()}
        parameters |= {theirs: beta for theirs, beta in betas.items() if beta is not None}
    return parameters


def write_rope(rope: Rope) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys, without the architecture's name before them, and the tensors of a rotary embedding."""
    keys: dict[str, Any] = {"rope.dimension_count": rope.dims, "rope.freq_base": rope.theta}
    if rope.scaling in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope.original_positions
    if rope.scaling == "yarn":
        keys |= {
            "rope.scaling.yarn_beta_fast": float(rope.high),
            "rope.scaling.yarn_beta_slow": float(rope.low),
        }
    always = (
        rope.short_factors == rope.long_factors and rope.magnitude == 1
    )  # as `_recovered` describes
    if rope.scaling == "longrope" and not always:
        keys["rope.scaling.attn_factor"] = rope.magnitude
        short, long = (
            np.array(factors, np.float32) for factors in (rope.short_factors, rope.long_factors)
        )
        return keys, {SHORT: short, LONG: long}
    return keys, {FACTORS: divisors(rope)} if rope.scaling in ("llama3", "longrope") else {}


def divisors(rope: Rope, *, position: int = 0) -> np.ndarray:
    """What divides the frequency of each pair of channels, `[dims / 2]`, in texts up to a position."""
    plain = dataclasses.replace(rope, scaling="none")
    at = jnp.full((1, 1), position)
    return np.asarray(frequencies(plain, at) / frequencies(rope, at), np.float32)


def _recovered(theta: float, factors: np.ndarray, original: int) -> dict[str, Any]:
    """Llama 3's parameters, where they give these factors; else the factors themselves."""
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
    return _by_channel(factors, factors, 1.0, original)


def _by_channel(
    short: np.ndarray, long: np.ndarray, attention: float, original: int
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [float(factor) for factor in short],
        "long_factor": [float(factor) for factor in long],
        "attention_factor": float(attention),
        "original_max_position_embeddings": original,
    }
