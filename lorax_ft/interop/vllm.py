"""Export for vLLM, which serves plain LoRA adapters up to the rank that it was started with.

Adapters that it cannot serve are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lorax_ft.interop.huggingface import stacks_experts
from lorax_ft.interop.peft import write_adapter
from lorax_ft.interop.peft_collect import collect_adapters
from lorax_ft.interop.peft_config import is_fused
from lorax_ft.interop.peft_experts import fit_fused, unified
from lorax_ft.interop.peft_names import all_modules
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.activation import INVOCATION
from lorax_ft.models.model import Model
from lorax_ft.models.trainable_tokens import trainable_tokens_of
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import Tree

# vLLM loads adapters on these for a few families only (`embedding_modules` in its model classes).
TABLES = {"embed_tokens", "lm_head"}
PLAIN_LORA = {"lora_a", "lora_b", "lora_scale"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank in vLLM 0.33


def save_for_vllm(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    max_lora_rank: int = 16,
    training_notes: str = "",
) -> Literal["adapter", "model"]:
    """Writes an adapter that vLLM's loader accepts, or the merged model if it has no form for it.

    Only plain LoRA on linear layers stays an adapter, with one rank and one alpha: smaller ranks
    are padded, and scales that differ go into B. DoRA, IA3, MiSS, fully trained modules,
    trainable tokens, and adapters on embeddings, the output head or gpt-oss's experts are merged.

    Args:
      folder: the place; the files are written next to it and then renamed.
      params: base and adapters together.
      model: the model as it was loaded.
      max_lora_rank: the rank that vLLM is started with; its default is 16.
      training_notes: as in `save_peft`.

    Returns:
      What was written.

    Raises:
      ValueError: the rank is above `max_lora_rank` (initializations that change the base, such as
        PiSSA, double it), or vLLM has no such `max_lora_rank`; and as `save_peft` and `save_model`.
    """
    if max_lora_rank not in RANKS:
        raise ValueError(
            f"max_lora_rank is {max_lora_rank}; vLLM takes {', '.join(map(str, RANKS))}"
        )
    if virtual_tokens(params) or INVOCATION in params:
        kind = "activated LoRA" if INVOCATION in params else "soft prompt"
        raise ValueError(
            f"no {kind} is written for vLLM, and it cannot be merged; export it with --target peft"
        )
    tokens, _ = trainable_tokens_of(params)
    if tokens:
        # vLLM's adapters have no rows of tokens, and its base no new ones.
        save_model(folder, params, model, training_notes=training_notes)
        return "model"
    adapters, modules_to_save = collect_adapters(params, model, None)
    is_plain_lora = all(matrix.keys() == PLAIN_LORA for matrix in adapters.values())
    # vLLM's form of adapters on experts that a checkpoint stacks is another than PEFT's.
    has_stacks = stacks_experts(model.hf_config) and any(map(is_fused, adapters))
    if modules_to_save or not is_plain_lora or has_stacks or TABLES & adapters.keys():
        save_model(folder, params, model, training_notes=training_notes)
        return "model"
    rank = max(matrix["lora_a"].shape[1] for matrix in adapters.values())
    if rank > max_lora_rank:
        raise ValueError(
            f"the adapter has rank {rank}, above max_lora_rank {max_lora_rank}: "
            f"{_way_out(rank)} merge it (--target hf)"
        )
    # Older servers read no patterns.
    fitted = unified(fit_fused(adapters, model))
    known = all_modules(model, params)
    write_adapter(folder, fitted, {}, known=known, model=model, training_notes=training_notes)
    return "adapter"


def _way_out(rank: int) -> str:
    """Returns the advice for an adapter whose rank is too high."""
    for enough in RANKS:
        if enough >= rank:
            return f"export with --max-lora-rank {enough}, and start vLLM with the same, or"
    return "vLLM takes no higher one;"
