"""Mistral: Llama with a sliding window (2310.06825)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

# `describe_common` reads the window.
FAMILY = Family(describe=lambda c: {})
