"""Qwen 3 with a mixture of experts in every layer (2505.09388)."""

from __future__ import annotations

from typing import Any

from lorax_ft.interop.families.family import Family, Fields
from lorax_ft.models.config import Experts


def describe(c: Any) -> Fields:
    """See `Family.describe`."""
    if c.mlp_only_layers or c.decoder_sparse_step != 1:
        # Layers of a decoder are stacked for the scan, so all must have the same parameters.
        raise ValueError("layers with a dense MLP among sparse ones; supported: all sparse")
    experts = Experts(
        count=c.num_experts, top_k=c.num_experts_per_tok, renormalized=c.norm_topk_prob
    )
    # intermediate_size is the width of dense MLPs, of which there is none here.
    return {"qk_norm": "head", "mlp_width": c.moe_intermediate_size, "experts": experts}


FAMILY = Family(keys=frozenset({"attention_bias", "sliding_window"}), describe=describe)
