"""Models as GGUF files for llama.cpp, through the gguf package's writer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorax_ft.interop.gguf import CONTROL, NAMES, NORMAL, PRE_TOKENIZERS, SPECIAL, UNUSED, USER_DEFINED, pre_tokenizer
from lorax_ft.interop.save import hf_tensors
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree


def save_gguf(file: str | Path, params: Tree, model: Model, *, kind: Literal["F16", "Q8_0"] = "Q8_0") -> None:
    """Writes `params`, with their adapters merged, as one .gguf file with its tokenizer.

    Args:
      file: written beside and renamed.
      params: parameters, with or without adapters.
      model: gives sizes and tokenizer.
      kind: of the matrices; vectors are float32.

    Raises:
      ValueError: the architecture is not a plain Llama, or the tokenizer is no byte-level BPE that llama.cpp knows.
      OSError: the disk is full, or may not be written.
    """
    import gguf

    file = Path(file)
    if file.resolve() == Path(model.source or " ").resolve():
        raise ValueError(f"{file} is where the model was loaded from; give another file")
    writer_kind = gguf.GGMLQuantizationType[kind]
    tokenizer = _tokenizer_fields(model)
    _check(model, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as scratch:
        new = Path(scratch) / file.name
        writer = gguf.GGUFWriter(new, "llama", use_temp_file=True)
        _write_sizes(writer, model, gguf.LlamaFileType[f"MOSTLY_{kind}"])
        _write_tokenizer(writer, model, tokenizer)
        for name, value in _tensors(params, model):
            matrix = value.ndim > 1
            stored = gguf.quants.quantize(value, writer_kind) if matrix else value
            writer.add_tensor(name, stored, raw_dtype=writer_kind if matrix else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        new.replace(file)


def _check(model: Model, dtype: str) -> None:
    c = model.config
    if dtype == "Q8_0" and any(size % 32 for size in (c.width, c.mlp_width, c.heads * c.head_dim)):
        raise ValueError("Q8_0 takes rows of a multiple of 32, which this model's are not; write F16 (--gguf-type F16)")
    kind = model.hf_config.get("model_type")
    (first, *others) = dict.fromkeys(model.config.kinds)
    if kind not in ("llama", "mistral") or others or first.window or not first.rope or first.rope.stretch != "none":
        raise ValueError(
            f"{model.source or 'the model'} ({kind}) cannot be written as GGUF; supported: Llama without windows and "
            "stretched positions; write a folder instead (--target hf), which llama.cpp's own converter reads"
        )
    if model.config.biases:
        raise ValueError(
            f"{model.source} has biases, which are not written as GGUF; write a folder instead (--target hf)"
        )


def _write_sizes(writer: Any, model: Model, file_type: Any) -> None:
    c = model.config
    rope = c.kinds[0].rope
    assert rope is not None
    writer.add_name(model.source or "lorax_ft")
    writer.add_file_type(file_type)
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)


def _write_tokenizer(writer: Any, model: Model, fields: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    writer.add_token_merges(fields["merges"])
    writer.add_add_bos_token(False)
    for name, key in SPECIAL.items():
        token = getattr(model.tokenizer, f"{name}_id")
        if token is not None:
            getattr(writer, f"add_{ {'unknown': 'unk', 'padding': 'pad'}.get(key, key) }_token_id")(token)
    if model.tokenizer.chat_template:
        writer.add_chat_template(model.tokenizer.chat_template)


def _tokenizer_fields(model: Model) -> dict[str, Any]:
    """Tokens, their types, merges, and llama.cpp's name for how text is cut into words."""
    if model.tokenizer is None or not model.tokenizer.is_fast:
        raise ValueError(f"{model.source or 'the model'} has no tokenizer.json, without which no GGUF file is written")
    parts = json.loads(model.tokenizer.backend_tokenizer.to_str())
    known = {name: json.loads(pre_tokenizer(name).__getstate__()) for name in PRE_TOKENIZERS}
    pre = next((name for name, parts_of in known.items() if parts_of == parts["pre_tokenizer"]), None)
    if parts["model"]["type"] != "BPE" or pre is None:
        raise ValueError(
            f"the tokenizer of {model.source or 'the model'} is not written as GGUF; supported: byte-level BPE as "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    vocabulary = {i: token for token, i in parts["model"]["vocab"].items()} | {
        i: t["content"] for i, t in added.items()
    }
    size = model.config.vocab_size
    kinds = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    return {
        "pre": pre,
        "tokens": [vocabulary.get(i, f"[PAD{i}]") for i in range(size)],
        "types": [kinds.get(i, NORMAL if i in vocabulary else UNUSED) for i in range(size)],
        "merges": merges,
    }


def _tensors(params: Tree, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under llama.cpp's names, in float32; the rows of q and k in its interleaved rotary order."""
    theirs = {name: key for key, name in NAMES.items()}
    heads = {"q_proj": model.config.heads, "k_proj": model.config.kv_heads}
    for path, leaf in merged_leaves(params, layout=model.layout):
        for name, value in hf_tensors(path, np.asarray(leaf, np.float32), {}):
            module, _, kind = name.rpartition(".")
            block, inner = "", module
            if module.startswith("model.layers."):
                _, _, layer, inner = module.split(".", 3)
                block = f"blk.{layer}."
            count = heads.get(module.rpartition(".")[2])
            if count:
                value = value.reshape(count, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
            yield f"{block}{theirs[inner]}.{kind}", np.ascontiguousarray(value)
