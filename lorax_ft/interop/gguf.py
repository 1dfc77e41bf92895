"""GGUF files: their config, tensors and tokenizer under Hugging Face's names.

Quantized blocks are decoded by the gguf package. What llama.cpp keeps otherwise is undone here: the rows of q and k in
the order of interleaved rotary pairs, norms with their offset added, and the experts of a layer in one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.gguf_architectures import find_architecture, module_names, read_config
from lorax_ft.interop.gguf_rope import FACTORS, LONG, SHORT
from lorax_ft.interop.gguf_tokenizer import read_tokenizer
from lorax_ft.interop.huggingface import Names, Tensors, decoder_config, family_names, hf_module
from lorax_ft.interop.lazy_tensor import Index, LazyTensor
from lorax_ft.models.config import DecoderConfig


def read_gguf(file: Path) -> tuple[dict[str, Any], Tensors, Any]:
    """What a Hugging Face folder would hold: the config.json, the tensors and the tokenizer.

    Raises:
      ValueError: the file is damaged, or its architecture or tokenizer is not supported.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{file} is not a readable GGUF file: {error}") from error
    try:
        if (parts := metadata.get("split.count", 1)) > 1:
            raise ValueError(f"is one of {parts} files; join them with llama-gguf-split --merge")
        config = read_config(metadata, {tensor.name: tensor.data for tensor in reader.tensors})
        tokenizer = read_tokenizer(metadata)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} in its metadata") from error
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    decoder = decoder_config(config, source=str(file))
    interleaved = find_architecture(metadata).interleaved
    heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads} if interleaved else {}
    tensors: dict[str, LazyTensor] = {}
    for tensor in reader.tensors:
        if tensor.name not in (FACTORS, SHORT, LONG):
            tensors |= _stored(tensor, decoder, heads, family_names(config))
    return config, tensors, tokenizer


def _stored(
    tensor: Any, config: DecoderConfig, heads: Mapping[str, int], names: Names
) -> Iterator[tuple[str, LazyTensor]]:
    """The tensor of a file under Hugging Face's name, or those of all experts that it holds."""
    shape = tuple(map(int, tensor.shape[::-1]))
    module = tensor.name.rpartition(".")[0].rpartition(".")[2]
    offset = config.norm_offset if module.endswith("norm") else 0.0
    if module.endswith("_exps"):
        for expert in range(shape[0]):
            name = _hf_name(tensor.name, module_names(config), names, expert=expert)
            yield (
                name,
                LazyTensor(
                    shape[1:],
                    functools.partial(_read, tensor.data[expert], tensor.tensor_type, None, 0.0),
                ),
            )
        return
    read = functools.partial(_read, tensor.data, tensor.tensor_type, heads.get(module), offset)
    yield _hf_name(tensor.name, module_names(config), names), LazyTensor(shape, read)


def _hf_name(
    name: str, modules: Mapping[str, str], names: Names, *, expert: int | None = None
) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    *block, module, leaf = name.rsplit(".", 3 if name.startswith("blk.") else 1)
    if module not in modules:
        return name
    path = "/".join([*(["layers", block[1]] if block else []), modules[module]])
    return f"{hf_module(path.replace('experts', f'experts/{expert}'), names)}.{leaf}"


def _read(
    data: np.ndarray, kind: Any, heads: int | None, offset: float, index: Index
) -> np.ndarray:
    """A part of the decoded tensor; with `heads`, its rows in Hugging Face's half-split rotary order."""
    import gguf

    array = gguf.quants.dequantize(data, kind)
    if heads is not None:
        array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array[index] - np.float32(offset) if offset else array[index]
