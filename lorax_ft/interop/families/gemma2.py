"""Gemma 2: Gemma with norms around attention and MLP, soft caps, and windows in every second layer (2408.00118)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families import gemma
from lorax_ft.interop.families.family import Family


def describe(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig`."""
    return gemma.describe(c) | {
        "norms": "around",
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "logit_softcap": c.final_logit_softcapping,
    }


FAMILY = Family(describe=describe)
