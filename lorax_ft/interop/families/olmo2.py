"""OLMo 2: norms after attention and MLP; query and key norms across all heads (2501.00656)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(
    keys=frozenset({"attention_bias"}), describe=lambda c: {"norms": "after", "qk_norm": "whole"}
)
