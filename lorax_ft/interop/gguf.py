"""GGUF files of llamas: their config, tensors and tokenizer under Hugging Face's names.

Quantised blocks are decoded by the gguf package. llama.cpp keeps the rows of q and k in an order of its
own (interleaved rotary halves), which is undone here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.huggingface import Tensors
from lorax_ft.interop.stored import Index, Stored
from lorax_ft.interop.tokenizer import import_transformers

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens; 3 and 4 are never split
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {"smollm": None, "llama-bpe": WORDS % r"\p{N}{1,3}", "qwen2": WORDS % r"\p{N}"}
"""llama.cpp's names for how a text is cut into words, by a regular expression; smollm's cuts digits apart."""
Metadata = dict[str, Any]


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
        if (architecture := metadata["general.architecture"]) != "llama":
            raise ValueError(f"{file} has the architecture {architecture!r}; supported in GGUF: llama")
        names = {tensor.name: _hf_name(tensor.name) for tensor in reader.tensors}
        config = _hf_config(metadata, tied="lm_head.weight" not in names.values())
        rows = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        heads = {name: rows.get(name.rpartition(".")[0].rpartition(".")[2]) for name in names.values()}
        tensors = {
            names[t.name]: Stored(tuple(map(int, t.shape[::-1])), functools.partial(_read, t, heads[names[t.name]]))
            for t in reader.tensors
        }
        return config, tensors, _tokenizer(metadata, file)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} in its metadata") from error


def pre_tokenizer(name: str) -> Any:
    """How a text is cut into words before its bytes are merged, by llama.cpp's name for it."""
    from tokenizers import Regex, pre_tokenizers

    words = PRE_TOKENIZERS[name]
    cut: Any = pre_tokenizers.Digits(individual_digits=True)
    if words is not None:
        cut = pre_tokenizers.Split(Regex(words), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=words is None)
    return pre_tokenizers.Sequence([cut, bytes_])


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    *block, module, leaf = name.rsplit(".", 3 if name.startswith("blk.") else 1)
    if module not in NAMES:
        return name
    return ".".join([*(["model.layers", block[1]] if block else []), NAMES[module], leaf])


def _read(tensor: Any, heads: int | None, index: Index) -> np.ndarray:
    """A part of the decoded tensor; with `heads`, its rows in Hugging Face's half-split rotary order."""
    import gguf

    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if heads is None:
        return array[index]
    return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)[index]


def _hf_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    scaling = metadata.get("llama.rope.scaling.type", "none")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": metadata.get("llama.vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", metadata["llama.embedding_length"] // heads),
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, not float32's
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_parameters": {
            "rope_type": "default" if scaling == "none" else scaling,
            "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        },
        "tie_word_embeddings": tied,
        **{f"{name}_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()},
    }


def _tokenizer(metadata: Metadata, file: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS or metadata.get("tokenizer.ggml.add_bos_token"):
        known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        raise ValueError(
            f"{file} has the tokenizer {kind}/{pre}; supported: {known}; use the Hugging Face folder instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, t == CONTROL) for token, t in zip(tokens, types, strict=True) if t in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in whole])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )
