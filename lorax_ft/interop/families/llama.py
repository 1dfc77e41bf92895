"""Llama 2, 3, 3.1, 3.2 and what has their architecture (SmolLM, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

FAMILY = Family(describe=lambda c: {})
