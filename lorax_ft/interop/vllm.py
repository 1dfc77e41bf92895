"""Adapters as vLLM serves them: plain LoRA of a rank it was started for; what it has no form for is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lorax_ft.interop.peft import save_peft
from lorax_ft.interop.peft_collect import collect_adapters
from lorax_ft.interop.save import save_model
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

TABLES = {
    "embed_tokens",
    "lm_head",
}  # whose adapters vLLM takes for some families only (`embedding_modules` there)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes (0.33)


def save_for_vllm(
    folder: str | Path, params: Tree, model: Model, *, max_lora_rank: int = 16
) -> Literal["adapter", "model"]:
    """Writes an adapter by the rules of vLLM's loader, or the merged model where they have no form for the adapter.

    Merged are DoRA, modules trained whole, and adapters on embeddings or the output head.

    Args:
      folder: written beside and renamed.
      params: base and adapters together.
      model: the model as it was loaded.
      max_lora_rank: what vLLM is started with; its default is 16.

    Returns:
      What was written.

    Raises:
      ValueError: the rank is above `max_lora_rank` (a start that was taken out of the base doubles it), or that is no
        value of vLLM's; and as `save_peft` and `save_model`.
    """
    if max_lora_rank not in RANKS:
        raise ValueError(
            f"max_lora_rank is {max_lora_rank}; vLLM takes {', '.join(map(str, RANKS))}"
        )
    adapters, whole = collect_adapters(params, model, None)
    if (
        whole
        or TABLES & adapters.keys()
        or any("magnitude" in matrix for matrix in adapters.values())
    ):
        save_model(folder, params, model)
        return "model"
    rank = max(matrix["lora_a"].shape[1] for matrix in adapters.values())
    if rank > max_lora_rank:
        enough = next((r for r in RANKS if r >= rank), None)
        way_out = f"export with --max-lora-rank {enough}, and start vLLM with the same, or"
        way_out = way_out if enough else "vLLM takes no higher one;"
        raise ValueError(
            f"the adapter has rank {rank}, above max_lora_rank {max_lora_rank}: {way_out} merge it (--target hf)"
        )
    save_peft(folder, params, model)
    return "adapter"
