"""Llama 2, 3, 3.1, 3.2 and models of the same architecture (SmolLM, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

# `describe_common` covers all of it.
FAMILY = Family(keys=frozenset({"attention_bias", "mlp_bias"}), describe=lambda c: {})
