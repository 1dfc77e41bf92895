"""SmolLM 3: some layers have no rotary embedding, NoPE (huggingface.co/blog/smollm3)."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax_ft.interop.families.family import Family, Fields, layer_types


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    layers = list(layer_types(c))
    if len(layers) == 1:
        layers = layers * c.num_hidden_layers
    # Despite its name, no_rope_layers holds 1 for layers with a rotary embedding and 0 for others.
    has_rope = c.no_rope_layers[: c.num_hidden_layers]
    for i in range(c.num_hidden_layers):
        if not has_rope[i]:
            layers[i] = dataclasses.replace(layers[i], rope=None)
    return {"layer_types": tuple(layers)}


FAMILY = Family(
    keys=frozenset({"attention_bias", "layer_types", "mlp_bias", "sliding_window"}),
    describe=describe,
)
