"""Read GGUF files: their config, tensors and tokenizer, under the names that Hugging Face uses.

The gguf package decodes quantized blocks. This module undoes what llama.cpp's converter changes:
it permutes the rows of q and k for interleaved rotary pairs, adds the offset to norms, and stacks
the experts of a layer in one tensor.
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
    """Reads what a Hugging Face folder would hold: the config.json, the tensors and the tokenizer.

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
        parts = metadata.get("split.count", 1)
        if parts > 1:
            raise ValueError(f"is one of {parts} files; join them with llama-gguf-split --merge")
        data = {tensor.name: tensor.data for tensor in reader.tensors}
        config = read_config(metadata, data)
        tokenizer = read_tokenizer(metadata)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} in its metadata") from error
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    decoder = decoder_config(config, source=str(file))
    _check_rotated(decoder, config, file)
    # llama.cpp's converter permutes q and k head by head, so undoing it needs the head counts.
    permuted_heads = {}
    if find_architecture(metadata).interleaved:
        permuted_heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}
    names = family_names(config)
    tensors: dict[str, LazyTensor] = {}
    for tensor in reader.tensors:
        # These hold rotary factors, not parameters: `read_config` has put them into the config.
        if tensor.name in (FACTORS, SHORT, LONG):
            continue
        tensors.update(_lazy_tensors(tensor, decoder, permuted_heads, names))
    return config, tensors, tokenizer


def _check_rotated(decoder: DecoderConfig, config: Mapping[str, Any], file: Path) -> None:
    """Raise where llama.cpp rotates a part of each head, and transformers' model all of it."""
    factor = config["rope_parameters"].get("partial_rotary_factor", 1)
    rope = decoder.layer_types[0].rope
    if factor != 1 and rope and rope.dims == decoder.head_dim:
        raise ValueError(
            f"{file} rotates {factor:g} of each head (rope.dimension_count), which "
            f"{config['model_type']} does not have; use the Hugging Face folder instead"
        )


def _lazy_tensors(
    tensor: Any,
    config: DecoderConfig,
    permuted_heads: Mapping[str, int],
    names: Names,
) -> Iterator[tuple[str, LazyTensor]]:
    """Yields a file's tensor under its Hugging Face name; for a stack of experts, one for each."""
    # gguf lists the dimensions with the fastest one first, numpy with the slowest.
    shape = tuple(map(int, tensor.shape[::-1]))
    path, _, _ = tensor.name.rpartition(".")
    _, _, module = path.rpartition(".")
    modules = module_names(config)
    if module.endswith("_exps"):
        for expert in range(shape[0]):
            name = _hf_name(tensor.name, modules, names, expert=expert)
            # No expert's rows are permuted, and none has an offset.
            data = tensor.data[expert]
            read_expert = functools.partial(_read, data, tensor.tensor_type, None, 0.0)
            yield name, LazyTensor(shape[1:], read_expert)
        return
    # Gemma multiplies by 1 + scale; llama.cpp's converter stores the sum.
    offset = 0.0
    if module.endswith("norm"):
        offset = config.norm_offset
    heads = permuted_heads.get(module)
    read = functools.partial(_read, tensor.data, tensor.tensor_type, heads, offset)
    yield _hf_name(tensor.name, modules, names), LazyTensor(shape, read)


def _hf_name(
    name: str,
    modules: Mapping[str, str],
    names: Names,
    *,
    expert: int | None = None,
) -> str:
    """Translates a tensor's name to Hugging Face's.

    `blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`. Unknown names stay as
    they are, and `load_params` reports them.
    """
    in_layer = name.startswith("blk.")
    *block, module, leaf = name.rsplit(".", 3 if in_layer else 1)
    if module not in modules:
        return name
    if module == "attn_sinks":
        return hf_module(f"layers/{block[1]}/{modules[module]}", names)
    path = modules[module].replace("experts", f"experts/{expert}")
    if in_layer:
        path = f"layers/{block[1]}/{path}"
    return f"{hf_module(path, names)}.{leaf}"


def _read(
    data: np.ndarray,
    ggml_type: Any,
    heads: int | None,
    offset: float,
    index: Index,
) -> np.ndarray:
    """Decodes a tensor and returns the part in `index`.

    With `heads`, the rows go from interleaved rotary pairs back to Hugging Face's half-split order.
    """
    import gguf

    array = gguf.quants.dequantize(data, ggml_type)
    if heads is not None:
        rows, *rest = array.shape
        pairs = array.reshape(heads, -1, 2, *rest)  # [H, C / 2, 2, ...]
        halves = pairs.swapaxes(1, 2)
        array = halves.reshape(rows, *rest)
    if offset:
        return array[index] - np.float32(offset)
    return array[index]
