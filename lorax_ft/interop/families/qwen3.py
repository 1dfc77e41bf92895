"""Qwen 3: norms on the queries and keys of each head (2505.09388)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(
    keys=frozenset({"attention_bias", "layer_types", "sliding_window"}),
    describe=lambda c: {"qk_norm": "head"},
)
