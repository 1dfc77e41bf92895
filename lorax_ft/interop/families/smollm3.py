"""SmolLM 3: some layers have no rotary embedding, NoPE (huggingface.co/blog/smollm3)."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax_ft.interop.families.family import Family, Fields, layer_types


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    kinds = list(layer_types(c))
    if len(kinds) == 1:
        kinds = kinds * c.num_hidden_layers
    # Despite its name, no_rope_layers holds 1 for layers with a rotary embedding and 0 for others.
    has_rope = c.no_rope_layers[: c.num_hidden_layers]
    for i in range(c.num_hidden_layers):
        if not has_rope[i]:
            kinds[i] = dataclasses.replace(kinds[i], rope=None)
    return {"layer_types": tuple(kinds)}


FAMILY = Family(describe=describe)
