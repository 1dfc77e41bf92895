"""The tensors of a model under llama.cpp's names, as its files hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lorax_ft.interop import gguf_qwen3_5
from lorax_ft.interop.gguf_modules import ENDINGS, is_offset_norm, module_names
from lorax_ft.interop.huggingface import LEAVES
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, with_layer_numbers


def add_tensors(writer: Any, params: Tree, model: Model, *, kind: str, interleaved: bool) -> None:
    """Adds all tensors to a file, with the adapters merged and the matrices quantized.

    Args:
      writer: the gguf package's.
      params: parameters, with or without adapters.
      model: has the sizes.
      kind: GGML type of the matrices.
      interleaved: whether the rows of q and k are permuted for interleaved rotary pairs.

    Raises:
      ValueError: llama.cpp has no such tensor for the architecture.
    """
    import gguf

    matrix_type = gguf.GGMLQuantizationType[kind]
    # The gguf package's member for gpt-oss is GPT_OSS.
    enum_name = writer.arch.upper().replace("-", "_")
    supported = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[enum_name]]
    for name, value in _tensors(params, model, interleaved):
        if name == "output.weight" and gguf.MODEL_TENSOR.OUTPUT not in supported:
            raise ValueError(
                f"the head is tuned, and llama.cpp's {writer.arch} has none beside the embedding "
                "table; write a folder instead (--target hf)"
            )
        # Routers stay in float32, since rounding could change which experts they choose.
        # So do the biases of all experts, which are a matrix.
        # llama.cpp has the convolutions of float32 only.
        is_vector = value.ndim == 1 or name.endswith(".bias")
        if is_vector or "ffn_gate_inp" in name or gguf_qwen3_5.CONVOLUTION in name:
            writer.add_tensor(name, value)
            continue
        packed = gguf.quants.quantize(value, matrix_type)
        writer.add_tensor(name, packed, raw_dtype=matrix_type)


def _tensors(params: Tree, model: Model, interleaved: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors under llama.cpp's names and with its order of rows, in float32."""
    config = model.config
    names = {path: name for name, path in module_names(config).items()}
    # By GGUF's name, the heads whose rows are permuted.
    permuted_heads = {}
    if interleaved:
        permuted_heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    linear = gguf_qwen3_5.linear_of(config)
    for path, leaf in merged_leaves(params, layout=model.layout):
        for block, place, part in _blocks(path, np.asarray(leaf)):
            module, _, leaf_name = place.rpartition("/")
            # Some leaves have names of their own, such as the sinks of attention.
            name = names.get(place) or names[module]
            value = np.asarray(part, np.float32)
            if leaf_name == "kernel":
                # [..., I, O] -> [..., O, I], and [W, 1, M] -> [M, 1, W]
                inputs = -3 if name == gguf_qwen3_5.CONVOLUTION else -2
                value = value.swapaxes(-1, inputs)
            if name in permuted_heads:
                value = _interleave(value, permuted_heads[name])
            if linear and module.startswith("linear_attn"):
                value = gguf_qwen3_5.to_file(name, value, linear)
            # Gemma multiplies by 1 + scale; llama.cpp's files hold the sum.
            if is_offset_norm(name):
                value = value + np.float32(config.norm_offset)
            ending = ENDINGS.get(name, f".{LEAVES.get(leaf_name, 'weight')}")
            yield f"{block}{name}{ending}", np.ascontiguousarray(value)


def _blocks(path: str, leaf: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields what a leaf stacks: GGUF's prefix for the layer, the path in it, and the array.

    A leaf outside the layers is yielded as it is.
    """
    if not path.startswith("layers/"):
        yield "", path, leaf
        return
    for i, part in enumerate(leaf):
        numbered = with_layer_numbers(f"layers/{i}/{path.removeprefix('layers/')}")
        _, layer, place = numbered.split("/", 2)
        yield f"blk.{layer}.", place, part


def _interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows from Hugging Face's half-split rotary order to interleaved pairs."""
    _, *rest = value.shape
    halves = value.reshape(heads, 2, -1, *rest)  # [H, 2, C / 2, ...]
    pairs = halves.swapaxes(1, 2)
    return pairs.reshape(value.shape)
