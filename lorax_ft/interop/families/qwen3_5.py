"""Qwen 3.5 and 3.6, their text models: gated linear attention in three of four layers (2412.06464).

The other layers have attention, with a gate on its output, and rotate a quarter of each head.
"""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family, Fields, layer_types
from lorax_ft.models.config import LayerType, LinearAttention


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    linear = LinearAttention(
        key_heads=c.linear_num_key_heads,
        value_heads=c.linear_num_value_heads,
        key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim,
        conv_width=c.linear_conv_kernel_dim,
    )
    # All layers with attention are of one type.
    attention, *_ = layer_types(c)
    by_name = {
        "full_attention": attention,
        "linear_attention": LayerType(rope=None, linear=linear),
    }
    return {
        "layer_types": tuple(by_name[name] for name in c.layer_types),
        "norm_offset": 1.0,
        "qk_norm": "head",
        "attention_gate": True,
    }


FAMILY = Family(
    keys=frozenset({"attention_bias", "layer_types"}), partial_rotary=True, describe=describe
)
