"""gpt-oss (2508.10925).

Attention sinks, windows in every second layer, and experts with biases and clamped activations.
"""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import ATTENTION, MLP, Family, Fields
from lorax_ft.models.config import ClampedGate, Experts


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    biases = MLP | {"gate"}
    if c.attention_bias:
        biases |= ATTENTION
    return {
        # Its softmax over the scores of the chosen experts is that over all, renormalized.
        "experts": Experts(
            count=c.num_local_experts, top_k=c.num_experts_per_tok, renormalized=True
        ),
        "biases": biases,
        "clamped_gate": ClampedGate(alpha=c.swiglu_alpha, limit=c.swiglu_limit),
        "sinks": True,
    }


FAMILY = Family(
    keys=frozenset({"attention_bias", "layer_types", "sliding_window"}),
    describe=describe,
    names={"gate": "router"},
    stacks_experts=True,
)
