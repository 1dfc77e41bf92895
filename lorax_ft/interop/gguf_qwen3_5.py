"""Qwen 3.5's gated linear attention in GGUF files, which llama.cpp calls qwen35.

Letters: H value heads, K key heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_ft.interop.gguf_rope import read_rope
from lorax_ft.models.config import DecoderConfig, LinearAttention

FIELDS = {
    "ssm.conv_kernel": ("linear_conv_kernel_dim", int),
    "ssm.state_size": ("linear_key_head_dim", int),
    "ssm.group_count": ("linear_num_key_heads", int),
    "ssm.time_step_rank": ("linear_num_value_heads", int),
}
"""GGUF's keys, and the names of config.json and types of their values."""
RECURRENT, INTERVAL = "attention.recurrent_layers", "full_attention_interval"
SECTIONS, MTP_LAYERS = "rope.dimension_sections", "nextn_predict_layers"
KEYS = frozenset({"ssm.inner_size", RECURRENT, INTERVAL, SECTIONS, MTP_LAYERS})
"""The other keys, which `read` and `write` handle."""
MODULES = {
    "attn_qkv": "linear_attn/in_proj_qkv",
    "attn_gate": "linear_attn/in_proj_z",
    "ssm_alpha": "linear_attn/in_proj_a",
    "ssm_beta": "linear_attn/in_proj_b",
    "ssm_conv1d": "linear_attn/conv1d",
    "ssm_a": "linear_attn/A_log",
    "ssm_dt": "linear_attn/dt_bias",
    "ssm_norm": "linear_attn/norm",
    "ssm_out": "linear_attn/out_proj",
}
VALUE_HEADS_AXIS = {
    "attn_qkv": 0,
    "attn_gate": 0,
    "ssm_alpha": 0,
    "ssm_beta": 0,
    "ssm_conv1d": 0,
    "ssm_a": 0,
    "ssm_dt": 0,
    "ssm_out": 1,
}
"""The axis of a tensor `[out, in]` that holds value heads, if any."""
CONVOLUTION = "ssm_conv1d"
DEFAULT_INTERVAL = 4
# How transformers splits the rotated pairs among time, height and width. In a text all three are
# the same number.
DEFAULT_SECTIONS = (11, 11, 10)
NORM_EPS = 1e-6  # of the lengths of queries and keys in transformers; llama.cpp has the norms'


def read(metadata: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what config.json has beyond the values that one key holds.

    The arguments are those of `read_rope`.
    """
    # The blocks that predict further tokens follow the layers, and are not loaded.
    layers = metadata[f"{name}.block_count"] - metadata.get(f"{name}.{MTP_LAYERS}", 0)
    # The last layer of each interval has full attention. Newer files have a list as well, which
    # need not be regular.
    interval = metadata.get(f"{name}.{INTERVAL}", DEFAULT_INTERVAL)
    by_interval = [(layer + 1) % interval != 0 for layer in range(layers)]
    recurrent = metadata.get(f"{name}.{RECURRENT}", by_interval)
    types = []
    for is_recurrent in recurrent[:layers]:
        types.append("linear_attention" if is_recurrent else "full_attention")
    # Of four sections, the last one is of no use to this model.
    sections = [int(size) for size in metadata[f"{name}.{SECTIONS}"][:3]]
    rope = read_rope(metadata, name, tensors)
    return {
        "num_hidden_layers": layers,
        "layer_types": types,
        # llama.cpp has one size for keys and values.
        "linear_value_head_dim": metadata[f"{name}.ssm.state_size"],
        "attention_bias": False,
        "rope_parameters": rope | {"mrope_section": sections, "mrope_interleaved": True},
    }


def write(config: DecoderConfig, hf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the keys that `read` reads, without the architecture's prefix, and no tensors.

    Args:
      config: the decoder's.
      hf: transformers' config.

    Raises:
      ValueError: llama.cpp computes something else.
    """
    recurrent = [layer.linear is not None for layer in config.each_layer]
    # Older versions of llama.cpp know only the interval.
    interval = config.layers + 1
    if False in recurrent:
        interval = recurrent.index(False) + 1
    sections = hf.rope_parameters.get("mrope_section") or DEFAULT_SECTIONS
    four_sections = [*sections, 0, 0, 0, 0][:4]
    keys: dict[str, Any] = {
        RECURRENT: recurrent,
        INTERVAL: interval,
        SECTIONS: four_sections,
    }
    linear = linear_of(config)
    if linear is None:
        return keys, {}
    if linear.key_dim != linear.value_dim:
        raise ValueError(
            f"has linear_key_head_dim {linear.key_dim} and linear_value_head_dim "
            f"{linear.value_dim}, and llama.cpp's qwen35 has one size for both"
        )
    if config.norm_eps != NORM_EPS:
        raise ValueError(
            f"has rms_norm_eps {config.norm_eps:g}, and llama.cpp's qwen35 computes what "
            f"transformers does only with {NORM_EPS:g}"
        )
    keys["ssm.inner_size"] = linear.value_heads * linear.value_dim
    return keys, {}


def linear_of(config: DecoderConfig) -> LinearAttention | None:
    """The sizes of linear attention, which all layers share that have it."""
    for layer in config.each_layer:
        if layer.linear:
            return layer.linear
    return None


def to_file(module: str, value: np.ndarray, linear: LinearAttention) -> np.ndarray:
    """A tensor `[out, in]` of one layer, as llama.cpp's files hold it.

    Args:
      module: GGUF's name.
      value: with value heads in the order of Hugging Face: those of one key head side by side; the
        convolution's is `[out, 1, in]`.
      linear: the sizes.
    """
    # Hugging Face trains log(-A), where files hold A.
    if module == "ssm_a":
        value = -np.exp(value)
    elif module == CONVOLUTION:
        value = value[:, 0]
    # Files go through the key heads first, as llama.cpp repeats keys by tiling them.
    groups = linear.value_heads // linear.key_heads
    return _transposed_heads(module, value, linear, (linear.key_heads, groups))


def from_file(module: str, value: np.ndarray, linear: LinearAttention) -> np.ndarray:
    """The inverse of `to_file`, but for the convolution's axis of 1."""
    if module == "ssm_a":
        value = np.log(-value)
    groups = linear.value_heads // linear.key_heads
    return _transposed_heads(module, value, linear, (groups, linear.key_heads))


def _transposed_heads(
    module: str, value: np.ndarray, linear: LinearAttention, order: tuple[int, int]
) -> np.ndarray:
    """A tensor with its value heads, a table of the shape `order`, transposed."""
    axis = VALUE_HEADS_AXIS.get(module)
    if axis is None:
        return value
    rows = np.moveaxis(value, axis, 0)
    # Queries and keys come before the values.
    before = 0
    if module in ("attn_qkv", CONVOLUTION):
        before = 2 * linear.key_heads * linear.key_dim
    kept, heads = rows[:before], rows[before:]
    table = heads.reshape(*order, -1, *heads.shape[1:])  # [K, H / K, C, ...] or [H / K, K, C, ...]
    heads = table.swapaxes(0, 1).reshape(heads.shape)
    return np.moveaxis(np.concatenate([kept, heads]), 0, axis)
