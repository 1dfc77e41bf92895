"""What GGUF files call architectures, their sizes and their modules: tables that are read forwards and backwards.

What an architecture does is said in `families`; here stands under which name, and what llama.cpp takes for granted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.interop.gguf_rope import ROPE_KEYS, read_rope
from lorax_ft.interop.gguf_tokenizer import SPECIAL
from lorax_ft.models.config import DecoderConfig

Metadata = Mapping[str, Any]
"""GGUF's keys and values, such as `llama.block_count`: 30."""
Field = tuple[str, type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture`."""

    kind: str
    """`model_type` in config.json."""
    model: str
    """Its class in transformers."""
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    """GGUF's keys beside `FIELDS`, which may be missing."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of config.json: what llama.cpp always does, where transformers' default is another."""
    interleaved: bool = False
    """Whether the rows of q and k stand in the order of the original rotary embedding, pairs side by side."""
    full_every: int = 0
    """Every so many layers one sees all tokens, the others a window; 0: nothing is said of layers."""
    local_theta: float | None = None
    """Of the layers with a window, where it is another than of the full ones."""
    by_width: int = 0
    """Layers of the size whose attention is scaled by 1 / √(width / heads) in place of 1 / √head_dim; 0: no such."""


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
WINDOW: dict[str, Field] = {"attention.sliding_window": ("sliding_window", int)}
CAPS: dict[str, Field] = {
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}
CHOSEN: dict[str, Field] = {"expert_used_count": ("num_experts_per_tok", int)}
KNOWN = {
    "vocab_size",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "expert_count",
    *ROPE_KEYS,
}
"""Keys that are read elsewhere, or say again what others say."""

ARCHITECTURES = {
    "llama": Architecture(kind="llama", model="LlamaForCausalLM", interleaved=True),
    "llama with experts": Architecture(
        kind="mixtral",
        model="MixtralForCausalLM",
        fields=CHOSEN | {"expert_count": ("num_local_experts", int)},
        interleaved=True,
    ),
    "qwen2": Architecture(kind="qwen2", model="Qwen2ForCausalLM"),
    "qwen3": Architecture(kind="qwen3", model="Qwen3ForCausalLM"),
    "qwen3moe with experts": Architecture(
        kind="qwen3_moe",
        model="Qwen3MoeForCausalLM",
        fields=CHOSEN
        | {
            "expert_count": ("num_experts", int),
            "expert_feed_forward_length": ("moe_intermediate_size", int),
        },
        fixed={"norm_topk_prob": True},
    ),
    "gemma": Architecture(kind="gemma", model="GemmaForCausalLM"),
    "gemma2": Architecture(
        kind="gemma2", model="Gemma2ForCausalLM", fields=WINDOW | CAPS, full_every=2, by_width=46
    ),
    "gemma3": Architecture(
        kind="gemma3_text",
        model="Gemma3ForCausalLM",
        fields=WINDOW | {"final_logit_softcapping": CAPS["final_logit_softcapping"]},
        full_every=6,
        local_theta=10000.0,
        by_width=62,
    ),
    "phi3": Architecture(
        kind="phi3",
        model="Phi3ForCausalLM",
        fields=WINDOW
        | {"rope.scaling.original_context_length": ("original_max_position_embeddings", int)},
    ),
    "smollm3": Architecture(kind="smollm3", model="SmolLM3ForCausalLM", interleaved=True),
    "olmo2": Architecture(kind="olmo2", model="Olmo2ForCausalLM"),
}

MODULES = {
    "attn_q": "self_attn/q_proj",
    "attn_k": "self_attn/k_proj",
    "attn_v": "self_attn/v_proj",
    "attn_qkv": "self_attn/qkv_proj",
    "attn_output": "self_attn/o_proj",
    "attn_q_norm": "self_attn/q_norm",
    "attn_k_norm": "self_attn/k_norm",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
    "ffn_gate_inp": "mlp/gate",
    "ffn_gate_exps": "mlp/experts/gate_proj",
    "ffn_up_exps": "mlp/experts/up_proj",
    "ffn_down_exps": "mlp/experts/down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}


def find_architecture(metadata: Metadata) -> Architecture:
    """What a file's `general.architecture` is here.

    Raises:
      ValueError: it is not supported, or has a property that is not.
    """
    name = metadata["general.architecture"]
    full = f"{name} with experts" if metadata.get(f"{name}.expert_count") else name
    if full not in ARCHITECTURES:
        raise ValueError(
            f"has the architecture {full!r}; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[full]
    known = KNOWN | FIELDS.keys() | architecture.fields.keys()
    for key, value in metadata.items():
        inner = key.removeprefix(f"{name}.")
        if inner not in (key, *known) and not inner.startswith(
            ("vision.", "mm.")
        ):  # Gemma 3's eyes stand apart
            raise ValueError(
                f"has {key} = {value}, which is not supported; use the Hugging Face folder instead"
            )
    return architecture


def module_names(config: DecoderConfig) -> dict[str, str]:
    """GGUF's name for a module, to its path in a layer or in the decoder."""
    before, fused = config.norms == "before", config.fused
    return (
        MODULES
        | ({"ffn_norm": "post_attention_layernorm"} if before else {})
        | ({"ffn_up": "mlp/gate_up_proj"} if fused else {})
    )


def read_config(metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a file with these keys; `tensors` are its arrays by GGUF's names.

    Raises:
      KeyError: a key is missing.
      ValueError: the architecture or a property of it is not supported.
    """
    architecture = find_architecture(metadata)
    name = metadata["general.architecture"]
    width, heads = metadata[f"{name}.embedding_length"], metadata[f"{name}.attention.head_count"]
    given = {
        f"{name}.attention.head_count_kv": heads,
        f"{name}.attention.key_length": width // heads,
        **metadata,
    }
    present = FIELDS | {
        key: field for key, field in architecture.fields.items() if f"{name}.{key}" in metadata
    }
    config = {field: _rounded(given[f"{name}.{key}"]) for key, (field, _) in present.items()}
    rope = read_rope(given, name, tensors)
    config |= {
        "model_type": architecture.kind,
        "architectures": [architecture.model],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
        **{
            f"{name}_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in SPECIAL.items()
        },
    }
    for bias, tensor in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_down")):
        if f"blk.0.{tensor}.bias" in tensors:
            config[bias] = True
    return config | _layers(architecture, config, metadata) | dict(architecture.fixed)


def _layers(architecture: Architecture, config: Metadata, metadata: Metadata) -> dict[str, Any]:
    """What config.json says of windows and scales, where llama.cpp knows it by the architecture and the size."""
    name, found = metadata["general.architecture"], {}
    if "sliding_window" in config:
        found["sliding_window"] = config["sliding_window"] or None  # phi3's 0 is none
    if every := architecture.full_every:
        every = metadata.get(f"{name}.attention.sliding_window_pattern", every)
        layers = range(config["num_hidden_layers"])
        windows = every if isinstance(every, list) else [bool((i + 1) % every) for i in layers]
        windows = windows if found.get("sliding_window") else [False for _ in layers]
        found["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windows
        ]
    if architecture.local_theta:
        theta = metadata.get(f"{name}.rope.freq_base_swa", architecture.local_theta)
        local = {"rope_type": "default", "rope_theta": _rounded(theta)}
        found["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        }
    if architecture.by_width:
        width = config["hidden_size"] // config["num_attention_heads"]
        by_width = config["num_hidden_layers"] == architecture.by_width
        found["query_pre_attn_scalar"] = width if by_width else config["head_dim"]
    return found


def _rounded(value: Any) -> Any:
    """A float32 as its author wrote it: 1e-5, not 9.99999974e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
