"""Gemma 4's dense text models (ai.google.dev/gemma/docs/core/model_card_4).

Gemma 3 with wider heads in the layers that see the whole text, where keys may be values too.
"""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family, Fields, make_rope, rotating_whole_heads
from lorax_ft.models.config import Heads, LayerType

UNSUPPORTED = {
    "hidden_size_per_layer_input": "embeddings for each layer, as in E2B and E4B",
    "num_kv_shared_layers": "layers that share keys and values, as in E2B and E4B",
    "enable_moe_block": "experts beside a dense MLP, as in 26B-A4B",
}


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    for name, meaning in UNSUPPORTED.items():
        if value := getattr(c, name):
            raise ValueError(f"{name} {value} ({meaning}); supported: none, as in 31B")
    return {
        "layer_types": tuple(_layer_type(c, i) for i in range(c.num_hidden_layers)),
        "norms": "around",
        "qk_norm": "head",
        "value_norm": True,
        "layer_scalar": True,
        "attention_scale": 1.0,
        "embedding_scale": c.hidden_size**0.5,
        "logit_softcap": c.final_logit_softcapping,
    }


def _layer_type(c: Any, i: int) -> LayerType:
    """The type of layer i."""
    attention = c.layer_types[i]
    own = c.per_layer_config[i]
    is_full = attention == "full_attention"
    rope = c.rope_parameters[attention]
    if rope["rope_type"] != "proportional":
        rope = rotating_whole_heads(rope)
    heads = Heads(
        count=own.num_key_value_heads,
        dim=own.head_dim,
        keys_are_values=is_full and c.attention_k_eq_v,
    )
    window = None if is_full else c.sliding_window
    return LayerType(rope=make_rope(rope, own), window=window, heads=heads)


FAMILY = Family(
    keys=frozenset(
        {
            "attention_bias",
            "hidden_activation",
            "layer_types",
            "sliding_window",
            "use_bidirectional_attention",
        }
    ),
    partial_rotary=True,
    describe=describe,
)
