"""Gemma: scaled embeddings, norms by 1 + w, a gated GELU (2403.08295)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family


def describe(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig`."""
    return {"embedding_scale": c.hidden_size**0.5, "norm_offset": 1.0}


FAMILY = Family(describe=describe)
