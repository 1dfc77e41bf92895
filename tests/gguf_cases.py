"""Small models and tokenizers of every GGUF architecture, for these tests and the parity tests."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lorax_ft.interop import gguf_tokenizer
from lorax_ft.interop.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 9.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "partial_rotary_factor": 0.75,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {"model_type": "llama", "head_dim": 64, "rope_parameters": LLAMA3},
    "llama3_of_other_length": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 64},
    },
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
        **GEMMA,
    },
    "gemma3": {"model_type": "gemma3_text", "rope_parameters": GEMMA3_ROPE, **GEMMA},
    "gemma4": GEMMA4,
    "gemma4_own_values": {
        **GEMMA4,
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "tie_word_embeddings": False,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 4 + ["full_attention"],
    },
    "qwen3_5": QWEN3_5,
    "qwen3_5_no_period": {
        **QWEN3_5,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "linear_num_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3"},
    "phi4_mini": {
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "rope_parameters": LONGROPE,
        "tie_word_embeddings": True,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "olmo2": {"model_type": "olmo2"},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "head_dim": 32,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,  # with 2, llama.cpp's rounding changes the routing of a token
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
}


SENTENCEPIECE = {"llama": True, "gemma": False, "gemma4": False}
"""Whether the tokenizer puts a space before each text."""
SPECIALS = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
PIECES = [
    "the",
    " apple",
    "s",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "'ll",
    "12345",
    "7",
    " it's",
    "naïve",
    "数学",
    "кот",
    "🦙",
    "x_y",
    "aaaa",
    "McDonald",
    "a/b\n",
]
ACCENTED = ["ÉCOLE", "e\u0301t", "हिन्दी"]


def tokenizer_keys(kind: str) -> dict[str, Any]:
    """The GGUF metadata of a trained tokenizer: of a pre-tokenizer or one of `SENTENCEPIECE`."""
    keys = _sentencepiece(kind) if kind in SENTENCEPIECE else _byte_level(kind)
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    architecture = "gemma4" if kind == "gemma4" else "llama"
    other = {"general.architecture": architecture, f"{architecture}.context_length": 128}
    return other | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def texts(*, accented: bool = True) -> Iterator[str]:
    """Texts with many kinds of spaces, scripts and digits.

    `accented` adds combining marks and capitals outside ASCII.
    """
    yield from (
        "",
        "Hello world",
        " before",
        "behind  ",
        "<s>one</s> two <unk>three",
        "\n\n\n a\n",
        "<0x0A>",
        "zebra zebra",
    )
    chance = random.Random(0)
    for _ in range(100):
        yield "".join(chance.choice([*PIECES, *ACCENTED * accented]) for _ in range(40))


def by_score(text: str, keys: dict[str, Any]) -> list[int]:
    """SentencePiece's token ids: split at special tokens, then merge the best pairs first."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    whole = [
        token for token, type_ in zip(tokens, types, strict=True) if type_ in gguf_tokenizer.WHOLE
    ]
    found: list[int] = []
    for part in re.split(
        f"({'|'.join(map(re.escape, sorted(whole, key=len, reverse=True)))})", text
    ):
        symbols = (
            [part]
            if part in whole
            else list(" " * bool(part and keys["tokenizer.ggml.add_space_prefix"]) + part)
        )
        found += _merged([s if s in whole else s.replace(" ", SPACE) for s in symbols], ids, keys)
    return found


def _merged(symbols: list[str], ids: dict[str, int], keys: dict[str, Any]) -> list[int]:
    scores = keys["tokenizer.ggml.scores"]
    while True:
        joined = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in ids
        ]
        if not joined:
            break
        _, at = min(joined)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        i
        for s in symbols
        for i in ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()])
    ]


def _sentencepiece(kind: str) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    words = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    # As in Gemma 4's vocabulary, which llama.cpp relies on, no token goes beyond the end of a line.
    lines = pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    learned = _train(tokenizer, vocab_size=500, limit_alphabet=60)
    joined = [token for token in learned if len(token) > 1]
    letters = [token for token in learned if len(token) == 1]
    spaces = ["  ", "    "] if kind == "gemma" else []  # of Gemma's that the user defined
    tokens = [*SPECIALS, *spaces, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *letters]
    types = [
        *SPECIALS.values(),
        *[USER_DEFINED for _ in spaces],
        *[BYTE] * 256,
        *[NORMAL for _ in learned],
    ]
    first = tokens.index("<0xFF>") + 1
    form = {"model": "llama", "pre": "default"}
    if kind == "gemma4":
        form = {"model": "gemma4", "merges": _all_merges(joined, learned)}
    return form | {
        "tokens": tokens,
        "token_type": types,
        "scores": [float(min(first - i - 1, 0)) for i in range(len(tokens))],
        "add_space_prefix": SENTENCEPIECE[kind],
    }


def _all_merges(joined: list[str], learned: list[str]) -> list[str]:
    """Every pair that makes one of the tokens `joined`, in their order."""
    known = set(learned)
    merges = []
    for token in joined:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if {left, right} <= known:
                merges.append(f"{left} {right}")
    return merges


def _byte_level(pre: str) -> dict[str, Any]:
    pre_tokenizer = gguf_tokenizer.PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = gguf_tokenizer.build_pre_tokenizer(pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned = _train(tokenizer, vocab_size=600, initial_alphabet=alphabet)
    merges = [merge for merge in _merges(tokenizer) if "".join(merge) in learned]
    tokens = [*SPECIALS, *learned, "Ġzebra"]  # the last by no merge
    types = [*SPECIALS.values(), *[NORMAL for _ in learned], NORMAL]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(m) for m in merges],
    }


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _train(tokenizer: Tokenizer, **options: Any) -> list[str]:
    """The tokens that a BPE tokenizer learns from a source file and the pieces, in merge order."""
    corpus = [
        Path(gguf_tokenizer.__file__).read_text(encoding="utf-8"),
        *("".join(PIECES) for _ in range(20)),
    ]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(show_progress=False, **options))
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
