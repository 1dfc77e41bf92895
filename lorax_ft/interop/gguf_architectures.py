"""Tables of GGUF's names for architectures and config values, to read and to write files.

`families` defines what each architecture computes. This module holds only the names, and what
llama.cpp hardcodes for an architecture and therefore leaves out of its files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorax_ft.interop import gguf_gemma4, gguf_qwen3_5
from lorax_ft.interop.gguf_rope import ROPE_KEYS, read_rope
from lorax_ft.interop.gguf_tokenizer import ENDS, SPECIAL
from lorax_ft.models.config import DecoderConfig

Metadata = Mapping[str, Any]
"""GGUF's keys and values, such as `llama.block_count`: 30."""
Field = tuple[str, type]
"""A name in config.json, and the type of its value."""
Read = Callable[[Metadata, str, Mapping[str, Any]], dict[str, Any]]
"""(metadata, the prefix of its keys, tensors) -> values of config.json."""
Write = Callable[[DecoderConfig, Any], tuple[dict[str, Any], dict[str, np.ndarray]]]
"""(decoder, transformers' config) -> GGUF keys without the prefix, and tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture`."""

    model_type: str
    """`model_type` in config.json."""
    model_class: str
    """The class in transformers."""
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    """Optional GGUF keys, beyond those in `FIELDS`."""
    read: Read | None = None
    """What config.json has beyond the values that one key holds; it replaces `read_rope`."""
    write: Write | None = None
    """The inverse of `read`."""
    keys: frozenset[str] = frozenset()
    """GGUF keys that only these two handle."""
    hardcoded: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of config.json that llama.cpp hardcodes, where transformers' default differs."""
    interleaved: bool = False
    """Whether the rows of q and k are permuted for interleaved rotary pairs, as in Meta's Llama."""
    full_every: int = 0
    """Every n-th layer has full attention, the others a sliding window; 0: no `layer_types`."""
    local_theta: float | None = None
    """Rotary base of the layers with a sliding window, where they have their own."""
    rounded_yarn: bool = True
    """Whether the model rounds yarn's borders to whole channels, as llama.cpp always does."""
    width_scaled_layers: int = 0
    """The number of layers of the one size whose attention scale is 1 / √(width / heads).

    All other sizes have 1 / √head_dim; with 0, every size has.
    """


FIELDS: dict[str, Field] = {
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
}
"""Keys of every architecture, without its prefix."""
WINDOW: dict[str, Field] = {"attention.sliding_window": ("sliding_window", int)}
SOFTCAPS: dict[str, Field] = {
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}
EXPERTS_USED: dict[str, Field] = {"expert_used_count": ("num_experts_per_tok", int)}
OTHER_KEYS = {
    "vocab_size",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "expert_count",
    *ROPE_KEYS,
}
"""Keys that `read_rope` or `read_config` handle, or that repeat what other keys contain."""

ARCHITECTURES = {
    "llama": Architecture(model_type="llama", model_class="LlamaForCausalLM", interleaved=True),
    "llama with experts": Architecture(
        model_type="mixtral",
        model_class="MixtralForCausalLM",
        fields=EXPERTS_USED | {"expert_count": ("num_local_experts", int)},
        interleaved=True,
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM"),
    "qwen3": Architecture(model_type="qwen3", model_class="Qwen3ForCausalLM"),
    "qwen35": Architecture(
        model_type="qwen3_5_text",
        model_class="Qwen3_5ForCausalLM",
        fields=gguf_qwen3_5.FIELDS,
        read=gguf_qwen3_5.read,
        write=gguf_qwen3_5.write,
        keys=gguf_qwen3_5.KEYS,
    ),
    "qwen3moe with experts": Architecture(
        model_type="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        fields=EXPERTS_USED
        | {
            "expert_count": ("num_experts", int),
            "expert_feed_forward_length": ("moe_intermediate_size", int),
        },
        hardcoded={"norm_topk_prob": True},
    ),
    "gemma": Architecture(model_type="gemma", model_class="GemmaForCausalLM"),
    "gemma2": Architecture(
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        fields=WINDOW | SOFTCAPS,
        full_every=2,
        width_scaled_layers=46,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        fields=WINDOW | {"final_logit_softcapping": SOFTCAPS["final_logit_softcapping"]},
        full_every=6,
        local_theta=10000.0,
        width_scaled_layers=62,
    ),
    "gemma4": Architecture(
        model_type="gemma4_text",
        model_class="Gemma4ForCausalLM",
        fields=WINDOW
        | {"final_logit_softcapping": SOFTCAPS["final_logit_softcapping"]}
        | gguf_gemma4.FIELDS,
        read=gguf_gemma4.read,
        write=gguf_gemma4.write,
        keys=gguf_gemma4.KEYS,
    ),
    "phi3": Architecture(
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        fields=WINDOW
        | {"rope.scaling.original_context_length": ("original_max_position_embeddings", int)},
    ),
    "smollm3": Architecture(
        model_type="smollm3", model_class="SmolLM3ForCausalLM", interleaved=True
    ),
    "gpt-oss with experts": Architecture(
        model_type="gpt_oss",
        model_class="GptOssForCausalLM",
        fields=WINDOW
        | EXPERTS_USED
        | {
            "expert_count": ("num_local_experts", int),
            "expert_feed_forward_length": ("intermediate_size", int),
        },
        full_every=2,
        rounded_yarn=False,
    ),
    "olmo2": Architecture(model_type="olmo2", model_class="Olmo2ForCausalLM"),
}


def find_architecture(metadata: Metadata) -> Architecture:
    """Looks up the architecture of a file by its `general.architecture`.

    Raises:
      ValueError: the architecture is not supported, or the file has a key that is not.
    """
    name = metadata["general.architecture"]
    full_name = name
    # llama.cpp uses one name for Llama and Mixtral; only the number of experts tells them apart.
    if metadata.get(f"{name}.expert_count"):
        full_name = f"{name} with experts"
    if full_name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"has the architecture {full_name!r}; supported in GGUF: {supported}")
    architecture = ARCHITECTURES[full_name]
    known = OTHER_KEYS | FIELDS.keys() | architecture.fields.keys() | architecture.keys
    prefix = f"{name}."
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        inner = key.removeprefix(prefix)
        # Gemma 3's files also describe its vision tower, which is not loaded.
        if inner in known or inner.startswith(("vision.", "mm.")):
            continue
        # Ignoring an unknown key could change the logits without notice.
        raise ValueError(
            f"has {key} = {value}, which is not supported; use the Hugging Face folder instead"
        )
    return architecture


def read_config(metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the config.json of a file with these keys; `tensors` holds its arrays by GGUF's names.

    Raises:
      KeyError: a key is missing.
      ValueError: the architecture or a property of it is not supported.
    """
    architecture = find_architecture(metadata)
    name = metadata["general.architecture"]
    width = metadata[f"{name}.embedding_length"]
    heads = metadata[f"{name}.attention.head_count"]
    # llama.cpp's defaults for keys that a file may omit.
    defaults = {
        f"{name}.attention.head_count_kv": heads,
        f"{name}.attention.key_length": width // heads,
    }
    metadata = defaults | dict(metadata)
    config = {}
    for key, (field, _) in FIELDS.items():
        config[field] = _rounded(metadata[f"{name}.{key}"])
    for key, (field, _) in architecture.fields.items():
        if f"{name}.{key}" in metadata:
            config[field] = _rounded(metadata[f"{name}.{key}"])
    config |= {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for token, key in SPECIAL.items():
        config[f"{token}_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    ends = {metadata[key] for key in ENDS if key in metadata}
    if len(ends) > 1:
        config["eos_token_id"] = sorted(ends)
    # No key says whether projections have biases; only the tensors do.
    for field, module in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_down")):
        if f"blk.0.{module}.bias" in tensors:
            config[field] = True
    if architecture.read:
        config |= architecture.read(metadata, name, tensors)
    else:
        config["rope_parameters"] = read_rope(metadata, name, tensors)
    config |= _layer_config(architecture, config, metadata)
    return config | dict(architecture.hardcoded)


def _layer_config(
    architecture: Architecture,
    config: Metadata,
    metadata: Metadata,
) -> dict[str, Any]:
    """Returns config.json's windows, rotary bases and attention scale.

    llama.cpp derives most of them from the architecture and the number of layers, so files often
    leave them out.
    """
    name = metadata["general.architecture"]
    found: dict[str, Any] = {}
    if "sliding_window" in config:
        found["sliding_window"] = config["sliding_window"] or None  # 0 is none (phi3)
    if architecture.full_every:
        pattern = metadata.get(f"{name}.attention.sliding_window_pattern", architecture.full_every)
        layers = config["num_hidden_layers"]
        found["layer_types"] = _layer_types(pattern, layers, window=found.get("sliding_window"))
    if not architecture.rounded_yarn and config["rope_parameters"]["rope_type"] == "yarn":
        found["rope_parameters"] = config["rope_parameters"] | {"truncate": False}
    if architecture.local_theta:
        theta = metadata.get(f"{name}.rope.freq_base_swa", architecture.local_theta)
        found["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": _rounded(theta)},
        }
    if architecture.width_scaled_layers:
        found["query_pre_attn_scalar"] = config["head_dim"]
        # Gemma 2 27B and Gemma 3 27B, which llama.cpp too recognizes by their number of layers.
        if config["num_hidden_layers"] == architecture.width_scaled_layers:
            width_per_head = config["hidden_size"] // config["num_attention_heads"]
            found["query_pre_attn_scalar"] = width_per_head
    return found


def _layer_types(pattern: int | list[bool], layers: int, *, window: int | None) -> list[str]:
    """Returns `layer_types` of config.json: every `pattern`-th layer has full attention.

    A list says for each layer whether it has a window.
    """
    if not window:
        return ["full_attention"] * layers
    if isinstance(pattern, list):
        windowed = pattern
    else:
        windowed = [(layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if has_window else "full_attention" for has_window in windowed]


def _rounded(value: Any) -> Any:
    """Restores the decimal that a float32 was written as: 1e-5, not 9.99999974e-06."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value
