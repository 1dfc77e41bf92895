"""GGUF's names of modules, and our paths of them."""

from __future__ import annotations

from lorax_ft.interop import gguf_qwen3_5
from lorax_ft.models.config import DecoderConfig

MODULES = {
    "attn_q": "self_attn/q_proj",
    "attn_k": "self_attn/k_proj",
    "attn_v": "self_attn/v_proj",
    "attn_qkv": "self_attn/qkv_proj",
    "attn_output": "self_attn/o_proj",
    "attn_sinks": "self_attn/sinks",
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
    "layer_output_scale": "layer_scalar",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}
"""GGUF's names of modules, and their paths in a layer or in the decoder.

Some of these paths are leaves (`ENDINGS`). `module_names` has the exceptions.
"""


ENDINGS = {"attn_sinks": ".weight", "layer_output_scale": ".weight", "ssm_a": "", "ssm_dt": ".bias"}
"""Leaves that GGUF names as modules, and what follows that name in the tensor's."""


def module_names(config: DecoderConfig) -> dict[str, str]:
    """Maps GGUF's name of each module to its path in a layer or in the decoder."""
    names = dict(MODULES)
    # `ffn_norm` is the norm before the MLP. Hugging Face calls it post_attention_layernorm, unless
    # the layer has norms around the MLP, as in Gemma 2.
    # gpt-oss's files, whose layers alone have sinks, keep Hugging Face's name, and Qwen 3.5's too.
    if gguf_qwen3_5.linear_of(config):
        names |= gguf_qwen3_5.MODULES
    if config.sinks or config.attention_gate:
        del names["ffn_norm"]
    elif config.norms == "before":
        names["ffn_norm"] = "post_attention_layernorm"
    # Phi 3's gate and up are one matrix, which llama.cpp names `ffn_up`.
    if config.fused:
        names["ffn_up"] = "mlp/gate_up_proj"
    return names


def is_offset_norm(module: str) -> bool:
    """Whether a module, by GGUF's name, is a norm whose scale has the family's offset."""
    return module.endswith("norm") and module != "ssm_norm"
