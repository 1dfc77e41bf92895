"""Qwen 3: norms on the queries and keys of each head (2505.09388)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(describe=lambda c: {"qk_norm": "head"})
