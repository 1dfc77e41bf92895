"""Mistral: Llama with a sliding window (2310.06825)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

# With layer_types, AutoModel takes the model for a Ministral, which has windows in some layers.
FAMILY = Family(keys=frozenset({"layer_types", "sliding_window"}), describe=lambda c: {})
