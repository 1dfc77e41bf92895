"""The text part of a checkpoint that sees images too.

Its config.json has the decoder's under `text_config`, and its tensors lie beside those of a vision
tower. Both become those of a text model, so that nothing else has to know of other parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_ft.interop.families import FAMILIES
from lorax_ft.interop.lazy_tensor import LazyTensor, Tensors
from lorax_ft.interop.tokenizer import import_transformers
from lorax_ft.models.model import PART_OF

HEAD = "lm_head.weight"
# Fields that checkpoints have beside `text_config`, where the text part has none of its own.
SHARED = (
    *("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
LANGUAGE_MODELS = ("model.language_model", "language_model.model", "model.text_model")
"""Where the decoder's modules lie in checkpoints of several parts, and in adapters for them."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a checkpoint's text part; of a text model, its own.

    >>> text_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    {'model_type': 'gemma3_text', 'architectures': ['Gemma3ForCausalLM'], 'text_part_of': 'gemma3'}
    """
    part = config.get("text_config")
    if _is_known(config) or not isinstance(part, dict):
        return dict(config)
    if not _is_known(part):  # the error is to name the whole's architecture
        return dict(config)
    text = copy.deepcopy(part)
    for name in SHARED:
        if name in config:
            text.setdefault(name, config[name])
    architecture = causal_lm(part["model_type"])
    return text | {"architectures": [architecture], PART_OF: config.get("model_type")}


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether the model is of a family here; a damaged config may hold anything."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in FAMILIES


def text_tensors(tensors: Tensors) -> Tensors:
    """The tensors of the text part, under the names that a text model has."""
    prefix = place_in(tensors) + "."
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found["model." + name.removeprefix(prefix)] = tensor
        elif name == HEAD or name == f"language_model.{HEAD}":
            found[HEAD] = tensor
    return found


def peft_place(config: Mapping[str, Any]) -> str:
    """Where the decoder lies in what AutoModelForCausalLM makes of the checkpoint, for PEFT.

    Of some checkpoints that is the text model, of others the whole with its vision tower.
    """
    whole = config.get(PART_OF)
    if whole is None or causal_lm(whole).endswith("ForCausalLM"):
        return "model"
    return "model.language_model"


def place_in(modules: Iterable[str]) -> str:
    """Where the decoder lies in the model whose modules have these names.

    >>> place_in(["model.language_model.layers.0.mlp.up_proj"])
    'model.language_model'
    """
    names = list(modules)
    for place in LANGUAGE_MODELS:
        if any(name.startswith(f"{place}.") for name in names):
            return place
    return "model"


def notice(config: Mapping[str, Any], *, source: str) -> str:
    """What a person should know of a text part, in one line.

    >>> notice({"model_type": "gemma3_text", "text_part_of": "gemma3"}, source="out/gemma")
    'out/gemma is a gemma3 checkpoint: its text part (gemma3_text) is loaded, other parts are not'
    """
    whole = config[PART_OF]
    text = config["model_type"]
    return (
        f"{source} is a {whole} checkpoint: its text part ({text}) is loaded, other parts are not"
    )


def causal_lm(model_type: str) -> str:
    """The class that transformers' AutoModelForCausalLM makes of such a checkpoint."""
    import_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
