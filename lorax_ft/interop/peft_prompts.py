"""Soft prompts as PEFT's folders: prompt tuning, P-tuning and prefix tuning.

PEFT saves what its encoders compute, one row for each virtual token (`prompt_embeddings`). The row
of a prefix holds the key and the value of each layer, one layer after the other.

Shapes: V virtual tokens, D width, L layers, P layers of a period, K key/value heads, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.lazy_tensor import all_finite, lazy_tensors
from lorax_ft.interop.peft_config import CONFIG, WEIGHTS
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import Model
from lorax_ft.models.soft_prompt import PROMPT_DOOR, prefix_doors
from lorax_ft.soft_prompts.door import KEY, PROMPT, VALUE
from lorax_ft.soft_prompts.encoder import LSTM, encoded
from lorax_ft.tree import Tree, flatten, join, unflatten

TENSOR = "prompt_embeddings"
BESIDE = "soft_prompt"
"""The folder of a soft prompt that was trained beside an adapter, in the adapter's folder."""
KINDS = {"PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
"""The `PromptConfig.kind` of PEFT's types."""


def holds_soft_prompt(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a soft prompt."""
    return config.get("peft_type") in KINDS


def prompt_contents(prompt: Tree, model: Model) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config of the folder of a soft prompt.

    Args:
      prompt: its leaves, as `soft_prompt_of` gives them.
      model: the decoder.

    Raises:
      ValueError: the model's layers have keys of several shapes, for which PEFT has no prefix.
    """
    c = model.config
    leaves = flatten(encoded(prompt))
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": model.source or None,
        "num_transformer_submodules": 1,
        "num_layers": c.layers,
    }
    if join(PROMPT_DOOR, PROMPT) in leaves:
        table = np.asarray(leaves[join(PROMPT_DOOR, PROMPT)], np.float32)
        config |= {"token_dim": c.width, "num_attention_heads": c.heads}
        config |= _kind_of_prompt(prompt)
    else:
        heads, channels = _key_shape(c)
        table = _table_of_prefix(leaves, c)
        config |= {
            "peft_type": "PREFIX_TUNING",
            "token_dim": heads * channels,
            "num_attention_heads": heads,
            "encoder_hidden_size": heads * channels,
            # The projection is computed already.
            "prefix_projection": False,
        }
    config["num_virtual_tokens"] = len(table)
    return {TENSOR: table}, config


def load_soft_prompt(folder: Path, config: Mapping[str, Any], model: Model) -> Tree:
    """The leaves of the soft prompt in a PEFT folder.

    Raises:
      ValueError: the folder is damaged, or of another model.
    """
    tensors = lazy_tensors(folder / WEIGHTS)
    if set(tensors) != {TENSOR}:
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ValueError(f"{folder}: {WEIGHTS} holds {found}; a soft prompt is {TENSOR} alone")
    table = np.asarray(tensors[TENSOR].read(()), np.float32)
    c = model.config
    count = config.get("num_virtual_tokens")
    width = c.width
    if KINDS[config["peft_type"]] == "prefix":
        heads, channels = _key_shape(c)
        width = 2 * c.layers * heads * channels
    if table.shape != (count, width):
        raise ValueError(
            f"{folder}: {TENSOR} has the shape {table.shape}; for {count} virtual tokens of this "
            f"model it must be ({count}, {width})"
        )
    if not count:
        raise ValueError(f"{folder / CONFIG}: num_virtual_tokens is {count}; it must be above 0")
    if not all_finite(table):
        raise ValueError(f"{folder}: {TENSOR} holds values that are not finite")
    if KINDS[config["peft_type"]] == "prompt":
        return {PROMPT_DOOR: {PROMPT: jnp.asarray(table)}}
    return _prefix_of_table(table, c)


def check_prompt_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a soft prompt is of an encoder-decoder, whose prompts are two."""
    modules = config.get("num_transformer_submodules")
    if modules not in (None, 1):
        raise ValueError(
            f"{folder / CONFIG}: num_transformer_submodules is {modules}; only decoders, which "
            "have 1, are supported"
        )


def _kind_of_prompt(prompt: Tree) -> dict[str, Any]:
    """The fields by which PEFT tells how a prompt was trained."""
    trained = flatten(prompt)
    if join(PROMPT_DOOR, PROMPT) in trained:
        return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    lstm = trained.get(join(PROMPT_DOOR, LSTM[0][1]))
    kernel = trained.get(join(PROMPT_DOOR, "encoder_kernel_0"))
    assert kernel is not None
    hidden = kernel.shape[1] if lstm is None else lstm.shape[1]
    return {
        "peft_type": "P_TUNING",
        "encoder_reparameterization_type": "MLP" if lstm is None else "LSTM",
        "encoder_hidden_size": hidden,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }


def _key_shape(config: DecoderConfig) -> tuple[int, int]:
    """The heads and channels of the keys of all layers.

    Raises:
      ValueError: they are not the same in all layers.
    """
    shapes = set()
    for layer_type in config.each_layer:
        heads = config.heads_of(layer_type)
        shapes.add((heads.count, heads.dim))
    if len(shapes) > 1:
        raise ValueError(
            f"PEFT's prefixes have one shape, and the keys of this model have {sorted(shapes)}"
        )
    return shapes.pop()


def _table_of_prefix(leaves: Mapping[str, Any], config: DecoderConfig) -> np.ndarray:
    """A prefix as PEFT has it, `[V, L · 2 · K · C]`."""
    by_place = []
    for door in prefix_doors(config):
        pair = [np.asarray(leaves[join(door, name)], np.float32) for name in (KEY, VALUE)]
        by_place.append(np.stack(pair, axis=1))  # [L / P, 2, V, K, C]
    # Layers of a period follow one another.
    layers = np.stack(by_place, axis=1)  # [L / P, P, 2, V, K, C]
    _, _, _, count, _, _ = layers.shape
    return np.moveaxis(layers, 3, 0).reshape(count, -1)


def _prefix_of_table(table: np.ndarray, config: DecoderConfig) -> Tree:
    """The leaves of a prefix that PEFT has as `[V, L · 2 · K · C]`."""
    shape = (len(table), -1, config.period, 2, *_key_shape(config))
    layers = np.moveaxis(table.reshape(shape), 0, 3)  # [L / P, P, 2, V, K, C]
    leaves = {}
    for place, door in enumerate(prefix_doors(config)):
        for number, name in enumerate((KEY, VALUE)):
            leaves[join(door, name)] = jnp.asarray(layers[:, place, number])
    return unflatten(leaves)
