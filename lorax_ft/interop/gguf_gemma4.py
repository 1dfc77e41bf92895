"""Gemma 4's two kinds of attention layers in GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_ft.interop.gguf_rope import FACTORS
from lorax_ft.models.config import DecoderConfig, LayerType

FIELDS = {
    "attention.shared_kv_layers": ("num_kv_shared_layers", int),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input", int),
}
"""GGUF's keys, and the names of config.json and types of their values."""
WINDOWED = "attention.sliding_window_pattern"
KEYS = frozenset(
    {
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.dimension_count_swa",
    }
)
"""The other keys, which `read` and `write` handle."""
# What divides the frequencies of pairs of channels that do not rotate.
STILL = 1e30


def read(metadata: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what config.json has beyond the values that one key holds.

    The arguments are those of `read_rope`.

    Raises:
      KeyError: a key is missing.
      ValueError: layers of one kind differ.
    """
    windowed = metadata[f"{name}.{WINDOWED}"]
    # A number where all layers have the same, else a list.
    heads = metadata[f"{name}.attention.head_count_kv"]
    if isinstance(heads, int):
        heads = [heads] * len(windowed)
    # By whether a layer has a window.
    counts: dict[bool, set[int]] = {True: set(), False: set()}
    for is_windowed, count in zip(windowed, heads, strict=True):
        counts[is_windowed].add(count)
    full = _only(counts[False], "attention.head_count_kv of full attention")
    local = _only(counts[True] or counts[False], "attention.head_count_kv of sliding windows")
    mlp_width = metadata[f"{name}.feed_forward_length"]
    if not isinstance(mlp_width, int):
        mlp_width = _only(set(mlp_width), "feed_forward_length")
    # Where values are the keys, full attention has no tensor for them.
    keys_are_values = f"blk.{windowed.index(False)}.attn_v.weight" not in tensors
    # As in transformers, where full attention has its own number of heads only in such models.
    if full != local and not keys_are_values:
        raise ValueError(
            f"has {full} key/value heads in full attention and {local} in sliding windows, beside "
            "values of their own, which is not supported; use the Hugging Face folder instead"
        )
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        "intermediate_size": mlp_width,
        "layer_types": [kinds[is_windowed] for is_windowed in windowed],
        "num_key_value_heads": local,
        "num_global_key_value_heads": full,
        "attention_k_eq_v": keys_are_values,
        "head_dim": metadata[f"{name}.attention.key_length_swa"],
        "global_head_dim": metadata[f"{name}.attention.key_length"],
        "attention_bias": False,
        "rope_parameters": _read_ropes(metadata, name, tensors[FACTORS]),
    }


def _only(values: set[int], key: str) -> int:
    """The value that all layers have."""
    if len(values) != 1:
        raise ValueError(
            f"has {len(values)} values in {key}, which is not supported; "
            "use the Hugging Face folder instead"
        )
    return next(iter(values))


def _read_ropes(metadata: Mapping[str, Any], name: str, divisors: np.ndarray) -> dict[str, Any]:
    """The `rope_parameters` of both kinds of layers."""
    divisors = np.asarray(divisors)
    # Pairs that rotate come first; a huge divisor holds the others still.
    rotates = divisors == 1
    rotating = int(rotates.sum())
    others_rotate = divisors[rotating:] < STILL
    if not rotates[:rotating].all() or others_rotate.any():
        raise ValueError(
            f"has other values than 1 and {STILL:g} in {FACTORS}, which is not supported; "
            "use the Hugging Face folder instead"
        )
    theta = float(metadata[f"{name}.rope.freq_base"])
    local_theta = float(metadata[f"{name}.rope.freq_base_swa"])
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": rotating / len(rotates),
            "rope_theta": theta,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
    }


def write(config: DecoderConfig, hf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the keys that `read` reads, without the architecture's prefix, and `rope_freqs`.

    Args:
      config: the decoder's.
      hf: transformers' config.

    Raises:
      ValueError: llama.cpp computes something else.
    """
    layers = config.each_layer
    # A model may lack one kind, but its keys are needed all the same.
    full = _find(layers, windowed=False) or layers[-1]
    local = _find(layers, windowed=True) or full
    rope, local_rope = full.rope, local.rope
    if rope is None or local_rope is None or rope.scaling != "proportional":
        kind = None if rope is None else rope.scaling
        raise ValueError(
            f"has rope_type {kind!r} in full attention, where llama.cpp's gemma4 has 'proportional'"
        )
    full_dim, local_dim = config.heads_of(full).dim, config.heads_of(local).dim
    counts = [config.heads_of(layer).count for layer in layers]
    is_uniform = len(set(counts)) == 1
    keys = {
        WINDOWED: [layer.window is not None for layer in layers],
        "attention.head_count_kv": counts[0] if is_uniform else counts,
        "attention.key_length": full_dim,
        "attention.value_length": full_dim,
        "attention.key_length_swa": local_dim,
        "attention.value_length_swa": local_dim,
        "rope.dimension_count": rope.dims,
        "rope.dimension_count_swa": local_rope.dims,
        "rope.freq_base": rope.theta,
        "rope.freq_base_swa": local_rope.theta,
    }
    # A divisor for each pair of channels of a head.
    divisors = np.full(rope.dims // 2, STILL, np.float32)
    divisors[: rope.rotating_pairs] = 1
    return keys, {FACTORS: divisors}


def _find(layers: tuple[LayerType, ...], *, windowed: bool) -> LayerType | None:
    """The first layer with a window, or without."""
    for layer in layers:
        if (layer.window is not None) == windowed:
            return layer
    return None
