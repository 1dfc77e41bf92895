"""Read GGUF files: their config, tensors and tokenizer, under the names that Hugging Face uses.

The gguf package decodes quantized blocks. This module undoes what llama.cpp's converter changes:
it permutes the rows of q and k for interleaved rotary pairs, adds the offset to norms, stacks the
experts of a layer in one tensor, and reorders the value heads of linear attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop import gguf_qwen3_5
from lorax_ft.interop.config_sizes import MOST_LAYERS
from lorax_ft.interop.gguf_architectures import find_architecture, read_config
from lorax_ft.interop.gguf_header import check_header
from lorax_ft.interop.gguf_modules import ENDINGS, is_offset_norm, module_names
from lorax_ft.interop.gguf_rope import FACTORS, LONG, SHORT
from lorax_ft.interop.gguf_tokenizer import read_tokenizer
from lorax_ft.interop.huggingface import Names, Tensors, decoder_config, family_names, hf_module
from lorax_ft.interop.lazy_tensor import Index, LazyTensor
from lorax_ft.models.config import DecoderConfig, LinearAttention


def read_gguf(file: Path) -> tuple[dict[str, Any], Tensors, Any]:
    """Reads what a Hugging Face folder would hold: the config.json, the tensors and the tokenizer.

    Raises:
      ValueError: the file is damaged, or its architecture or tokenizer is not supported.
    """
    import gguf

    try:
        check_header(file)
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    # The package checks little, and raises what NumPy and its enums do.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} is not a readable GGUF file: {reason}") from error
    try:
        parts = metadata.get("split.count", 1)
        if parts > 1:
            raise ValueError(f"is one of {parts} files; join them with llama-gguf-split --merge")
        _check_blocks(metadata)
        data = {tensor.name: tensor.data for tensor in reader.tensors}
        config = read_config(metadata, data)
        tokenizer = read_tokenizer(metadata)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} in its metadata") from error
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    # A key may hold a value of any type, and the Rust library of tokenizers raises Exception.
    except Exception as error:
        raise ValueError(f"{file} has metadata of the wrong type: {error}") from error
    decoder = decoder_config(config, source=str(file))
    _check_rotated(decoder, config, file)
    # llama.cpp's converter permutes q and k head by head, so undoing it needs the head counts.
    permuted_heads = {}
    if find_architecture(metadata).interleaved:
        permuted_heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}
    names = family_names(config)
    blocks = metadata[f"{metadata['general.architecture']}.block_count"]
    beyond = tuple(f"blk.{i}." for i in range(decoder.layers, blocks))
    tensors: dict[str, LazyTensor] = {}
    for tensor in reader.tensors:
        # Blocks that predict further tokens, as in Qwen 3.5.
        if tensor.name.startswith(beyond):
            continue
        # These hold rotary factors, not parameters: `read_config` has put them into the config.
        if tensor.name in (FACTORS, SHORT, LONG):
            continue
        tensors.update(_lazy_tensors(tensor, decoder, permuted_heads, names))
    return config, tensors, tokenizer


def _check_blocks(metadata: Mapping[str, Any]) -> None:
    """Raise for a number of layers of which not even a list can be made."""
    blocks = metadata[f"{metadata['general.architecture']}.block_count"]
    if not isinstance(blocks, int) or not 0 < blocks <= MOST_LAYERS:
        raise ValueError(f"has a block_count of {blocks!r}; supported are 1 to {MOST_LAYERS:,}")


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
    module = _module(tensor.name)
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
    if is_offset_norm(module):
        offset = config.norm_offset
    heads = permuted_heads.get(module)
    read = functools.partial(_read, tensor.data, tensor.tensor_type, heads, offset)
    name = _hf_name(tensor.name, modules, names)
    linear = gguf_qwen3_5.linear_of(config)
    if linear and modules.get(module, "").startswith("linear_attn/"):
        yield name, _of_linear_attention(module, LazyTensor(shape, read), linear)
        return
    yield name, LazyTensor(shape, read)


def _of_linear_attention(module: str, tensor: LazyTensor, linear: LinearAttention) -> LazyTensor:
    """A tensor of linear attention with Hugging Face's order of heads."""
    shape = tensor.shape
    if module == gguf_qwen3_5.CONVOLUTION:
        shape = (shape[0], 1, *shape[1:])

    def read(index: Index) -> np.ndarray:
        value = gguf_qwen3_5.from_file(module, tensor.read(()), linear)
        return value.reshape(shape)[index]

    return LazyTensor(shape, read)


def _module(name: str) -> str:
    """GGUF's name of the module that a tensor belongs to.

    >>> _module("blk.3.attn_q.weight"), _module("blk.3.ssm_a"), _module("output.weight")
    ('attn_q', 'ssm_a', 'output')
    """
    parts = name.split(".")
    if parts[0] == "blk":
        parts = parts[2:] or parts
    return parts[0]


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
    module = _module(name)
    if module not in modules:
        return name
    path = modules[module].replace("experts", f"experts/{expert}")
    if name.startswith("blk."):
        layer = name.split(".")[1]
        path = f"layers/{layer}/{path}"
    path = hf_module(path, names)
    _, _, leaf = name.rpartition(module)
    if module in ENDINGS:
        # Any other ending is a tensor of another name, which `load_params` reports.
        leaf = leaf.removeprefix(ENDINGS[module])
    return path + leaf


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
