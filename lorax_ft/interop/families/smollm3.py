"""SmolLM 3: some layers know no positions (huggingface.co/blog/smollm3)."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax_ft.interop.families.family import Family, layer_types


def describe(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig`."""
    knows = c.no_rope_layers[: c.num_hidden_layers]
    types = layer_types(c)
    types = types if len(types) > 1 else types * c.num_hidden_layers
    return {
        "layer_types": tuple(
            t if r else dataclasses.replace(t, rope=None) for t, r in zip(types, knows, strict=True)
        )
    }


FAMILY = Family(describe=describe)
