"""SmolLM 3: some layers know no positions (huggingface.co/blog/smollm3)."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax_ft.interop.families.family import Family, layer_kinds


def describe(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig`."""
    knows = c.no_rope_layers[: c.num_hidden_layers]
    kinds = layer_kinds(c)
    kinds = kinds if len(kinds) > 1 else kinds * c.num_hidden_layers
    return {
        "kinds": tuple(
            k if r else dataclasses.replace(k, rope=None) for k, r in zip(kinds, knows, strict=True)
        )
    }


FAMILY = Family(describe=describe)
