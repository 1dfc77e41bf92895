"""Gemma 2 (2408.00118).

Gemma with norms before and after attention and MLP, logit soft-capping, and a sliding window in
every second layer.
"""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families import gemma
from lorax_ft.interop.families.family import Family, Fields


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    return gemma.describe(c) | {
        "norms": "around",
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "logit_softcap": c.final_logit_softcapping,
    }


KEYS = gemma.FAMILY.keys | {"hidden_activation", "layer_types", "sliding_window"}
FAMILY = Family(keys=KEYS, describe=describe)
