"""Trainable tokens in PEFT's folders: `trainable_token_indices` of LoRA, or a type of their own.

A tensor `trainable_tokens_delta` `[N, D]` holds the tokens' new rows, and no differences, in the
order of the indices. PEFT writes it for a tied head too, and then the whole tables if the
vocabulary has grown.

Letters: V vocabulary, D width, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.huggingface import family_names, hf_module
from lorax_ft.interop.lazy_tensor import all_finite, lazy_tensors
from lorax_ft.interop.peft_config import CONFIG, WEIGHTS, is_target
from lorax_ft.interop.peft_folder import Contents
from lorax_ft.interop.peft_tensors import FIELD, PREFIX, TENSOR, WRAPPER
from lorax_ft.interop.text_part import peft_place
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.lowrank.terms.tokens import ACTIVE, COLUMNS, IDS, ROWS
from lorax_ft.models.model import HEAD, TABLE, Model
from lorax_ft.program import either
from lorax_ft.tree import Layer, Tree, modules

TYPE = "TRAINABLE_TOKENS"


def trains_tokens_alone(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is that of trainable tokens without another adapter."""
    return config.get("peft_type") == TYPE


def tokens_alone(tokens: Tree, model: Model) -> Contents:
    """The contents of a folder of trainable tokens, as `trainable_tokens_of` gives them.

    Raises:
      ValueError: the embedding and the head train different tokens.
    """
    tensors, ids = _tensors(tokens, model, wrapper="")
    first, *others = ids.values()
    if any(other != first for other in others):
        raise ValueError("the embedding and the head train different tokens")
    config = {
        "peft_type": TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": model.source or None,
        "token_indices": first,
        "target_modules": sorted(ids),
    }
    return tensors, config


def beside_adapter(contents: Contents, tokens: Tree, model: Model) -> Contents:
    """The contents of an adapter's folder with those of trainable tokens."""
    tensors, config = contents
    of_tokens, ids = _tensors(tokens, model, wrapper=WRAPPER)
    return tensors | of_tokens, config | {FIELD: ids}


def _tensors(
    tokens: Tree, model: Model, *, wrapper: str
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """The rows of trained tokens by PEFT's names, and their ids by the module's last name."""
    names = family_names(model.hf_config)
    tensors = {}
    ids = {}
    for path, layer in modules(tokens).items():
        if IDS not in layer:
            continue
        module = hf_module(path, names, place=peft_place(model.hf_config))
        rows = layer[ROWS] if ROWS in layer else layer[COLUMNS].T
        tensors[f"{PREFIX}{module}{wrapper}.{TENSOR}"] = np.ascontiguousarray(rows)
        ids[module.rpartition(".")[2]] = np.asarray(layer[IDS]).tolist()
    return tensors, ids


def with_tokens(
    layers: Mapping[str, Layer], folder: Path, config: Mapping[str, Any], model: Model
) -> dict[str, Layer]:
    """The layers with the trainable tokens of a folder, if it has any.

    Raises:
      ValueError: the tensors do not fit the config or the model, or the folder's tokenizer calls
        one of the tokens by another name than the model's.
    """
    if not config.get(FIELD) and not trains_tokens_alone(config):
        return dict(layers)
    found: dict[str, Layer] = {}
    names = family_names(model.hf_config)
    for path in (TABLE, HEAD):
        module = hf_module(path, names, place=peft_place(model.hf_config))
        ids = _ids_of(module, config, folder)
        rows = _rows_of(module, folder)
        if rows is None:
            continue
        _check(rows, ids, module, folder, model)
        order = np.argsort(ids)
        own = {IDS: jnp.asarray(np.asarray(ids, np.int32)[order]), ACTIVE: jnp.ones(())}
        sorted_rows = jnp.asarray(rows[order], jnp.float32)
        found[path] = own | ({ROWS: sorted_rows} if path == TABLE else {COLUMNS: sorted_rows.T})
    if not found:
        raise ValueError(f"{folder}: {CONFIG} names tokens, but {WEIGHTS} has no {TENSOR}")
    _check_names(found, folder, model)
    if model.config.tied and HEAD in found:
        # PEFT repeats the rows of a tied table.
        if TABLE not in found or not jnp.array_equal(found[TABLE][ROWS], found[HEAD][COLUMNS].T):
            raise ValueError(
                f"{folder} trains tokens of the head apart from the embedding that it is tied to, "
                "which is not supported; merge it in PEFT"
            )
        del found[HEAD]
    return {**layers, **{path: layers.get(path, {}) | layer for path, layer in found.items()}}


def _ids_of(module: str, config: Mapping[str, Any], folder: Path) -> list[int]:
    """The tokens that train in a module, in the order of their rows."""
    given = config.get("token_indices" if trains_tokens_alone(config) else FIELD) or []
    if isinstance(given, dict):
        # By name, or its last parts. A tied head has the embedding's.
        by_name = [ids for name, ids in given.items() if is_target(module, [name])]
        given = by_name[0] if by_name else next(iter(given.values()), [])
    valid = isinstance(given, list) and all(type(i) is int and i >= 0 for i in given)
    if not valid or len(set(given)) < len(given):
        raise ValueError(
            f"{folder / CONFIG}: {FIELD} is {str(given)[:80]}; it must be a list of ids, each once"
        )
    return given


def _rows_of(module: str, folder: Path) -> np.ndarray | None:
    """The rows of a module's trained tokens, `[N, D]`; None: it has none."""
    tensors = lazy_tensors(folder / WEIGHTS)
    for wrapper in (WRAPPER, ""):
        key = f"{PREFIX}{module}{wrapper}.{TENSOR}"
        if key in tensors:
            return np.asarray(tensors[key].read(()), np.float32)
    return None


def _check(rows: np.ndarray, ids: list[int], module: str, folder: Path, model: Model) -> None:
    """Raise where rows do not fit the tokens or the model."""
    expected = (len(ids), model.config.width)
    if rows.shape != expected or not ids:
        raise ValueError(
            f"{folder}: {TENSOR} of {module} has the shape {rows.shape}; for the {len(ids)} tokens "
            f"in {CONFIG} and this model it must be {expected}"
        )
    if not all_finite(rows):
        raise ValueError(f"{folder}: {TENSOR} of {module} holds values that are not finite")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"{folder} trains token {max(ids)}, and the model has {model.config.vocab_size} "
            f"tokens; {_way_to_tokens()}"
        )


def _check_names(found: Mapping[str, Layer], folder: Path, model: Model) -> None:
    """Raise where the folder's tokenizer has other texts for the tokens than the model's."""
    theirs = load_tokenizer(folder)
    if theirs is None or model.tokenizer is None:
        return
    for layer in found.values():
        for i in np.asarray(layer[IDS]).tolist():
            text, own = theirs.convert_ids_to_tokens(i), model.tokenizer.convert_ids_to_tokens(i)
            if text != own:
                raise ValueError(
                    f"{folder} trains token {i}, which is {text!r} there and {own!r} in the model; "
                    f"{_way_to_tokens()}"
                )


def _way_to_tokens() -> str:
    """How a model gets the tokens of an adapter."""
    return either(
        "give the model the adapter's tokens first: model = lft.with_tokens_of(folder, model)",
        "the model gets the tokens of the tokenizer in the folder of --run, --adapter or "
        "--adapter.continue_from alone, which must have them",
    )
