"""Model families: how a config.json describes our decoder, and how its tensors are named.

To add a family, write a file here with a `Family` and add it to `FAMILIES` under the `model_type`
of its config.json. `Family.keys` names the keys that transformers heeds in it and ignores in other
families. What its architecture does that no other does becomes a field of `DecoderConfig` and a
line in `lorax_ft/models`; a line in the table of tests/parity/test_transformers.py checks the
logits against transformers.
"""

from __future__ import annotations

from lorax_ft.interop.families import (
    gemma,
    gemma2,
    gemma3,
    gemma4,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    smollm3,
)
from lorax_ft.interop.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_5_text": qwen3_5.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gemma4_text": gemma4.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "phi3": phi3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "mixtral": mixtral.FAMILY,
}
