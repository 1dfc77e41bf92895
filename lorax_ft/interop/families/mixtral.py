"""Mixtral: Mistral with a mixture of experts in every layer (2401.04088)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family, Fields
from lorax_ft.models.config import Experts


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    experts = Experts(count=c.num_local_experts, top_k=c.num_experts_per_tok, renormalized=True)
    return {"experts": experts}


FAMILY = Family(
    keys=frozenset({"sliding_window"}),
    describe=describe,
    names={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
