"""Qwen 2 and 2.5: biases on q, k and v (2407.10671)."""

from __future__ import annotations

from lorax_ft.interop.families.family import Family

# Qwen's config has no attention_bias; the biases are part of the architecture.
FAMILY = Family(
    keys=frozenset({"layer_types", "sliding_window"}),
    describe=lambda c: {"biases": frozenset({"q_proj", "k_proj", "v_proj"})},
)
