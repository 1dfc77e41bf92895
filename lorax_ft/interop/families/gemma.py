"""Gemma: scaled embeddings, norms that multiply by 1 + w, a gated GELU (2403.08295)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family, Fields


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    # The checkpoints store w, not 1 + w.
    return {"embedding_scale": c.hidden_size**0.5, "norm_offset": 1.0}


FAMILY = Family(
    keys=frozenset({"attention_bias", "use_bidirectional_attention"}), describe=describe
)
