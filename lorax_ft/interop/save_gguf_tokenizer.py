"""Tokenizers as GGUF files hold them; what they would not give back with the same ids is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lorax_ft.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_pre_tokenizer,
    read_tokenizer,
)
from lorax_ft.models.model import Model

PROBE = "Hello  world,\n\n\tit's 1234.5 naïve 数学 кот 🦙 x_y == z   "


def tokenizer_metadata(model: Model, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model's tokenizer: tokens, their types, merges or scores, how text is cut, the chat template.

    Args:
      model: has the tokenizer.
      metadata: the model's other keys.

    Raises:
      ValueError: it has none, or of a kind that llama.cpp does not know.
    """
    tokenizer, source = model.tokenizer, model.source or "the model"
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(f"{source} has no tokenizer.json, without which no GGUF file is written")
    begun, bos, eos = tokenizer("").input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and begun[:1] == [bos]
    common = {"add_bos_token": starts, "add_eos_token": eos is not None and begun[starts:] == [eos]}
    ids = {f"{key}_token_id": getattr(tokenizer, f"{name}_id") for name, key in SPECIAL.items()}
    common |= {key: i for key, i in ids.items() if i is not None}
    template = (
        {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    )
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] == "BPE":
        forms = _sentencepiece if parts["model"].get("byte_fallback") else _byte_level
        for form in forms(parts, model.config.vocab_size):
            keys = {
                f"tokenizer.ggml.{key}": value for key, value in (form | common).items()
            } | template
            if read_tokenizer({**metadata, **keys})(PROBE).input_ids == tokenizer(PROBE).input_ids:
                return keys
    raise ValueError(
        f"the tokenizer of {source} is not written as GGUF; supported: SentencePiece's BPE, and byte-level BPE as "
        f"{', '.join(PRE_TOKENIZERS)}"
    )


def _byte_level(parts: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The form under llama.cpp's name for how its words are cut, if there is one."""
    bpe = parts["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    tokens, types = _tokens(parts, size)
    for pre, pre_tokenizer in PRE_TOKENIZERS.items():
        cut = _without_offsets(json.loads(build_pre_tokenizer(pre_tokenizer).__getstate__()))
        if cut == _without_offsets(parts["pre_tokenizer"]) and pre_tokenizer.ignore_merges == bool(
            bpe.get("ignore_merges")
        ):
            yield {
                "model": "gpt2",
                "pre": pre,
                "tokens": tokens,
                "token_type": types,
                "merges": merges,
            }


def _sentencepiece(parts: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The forms with and without a space before texts; a token's score is the higher, the earlier it is merged."""
    tokens, types = _tokens(parts, size)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for prefix in (True, False):
        keys = {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "token_type": types,
            "scores": scores,
        }
        yield keys | {"add_space_prefix": prefix}


def _tokens(parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The texts of all ids and llama.cpp's types of them."""
    bpe, added = parts["model"], {token["id"]: token for token in parts["added_tokens"]}
    texts = {i: token for token, i in bpe["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    if bpe.get("byte_fallback"):
        types |= {
            bpe["vocab"][byte]: BYTE
            for byte in (f"<0x{b:02X}>" for b in range(256))
            if byte in bpe["vocab"]
        }
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
        texts[i] = token["content"] if token["special"] else token["content"].replace(SPACE, " ")
    if bpe.get("unk_token") in bpe["vocab"]:
        types[bpe["vocab"][bpe["unk_token"]]] = UNKNOWN
    return [texts.get(i, f"[PAD{i}]") for i in range(size)], [
        types.get(i, UNUSED) for i in range(size)
    ]


def _without_offsets(cut: Any) -> Any:
    """A pre-tokenizer's description without what changes no id."""
    if isinstance(cut, list):
        return [_without_offsets(part) for part in cut]
    return (
        {k: _without_offsets(v) for k, v in cut.items() if k != "trim_offsets"}
        if isinstance(cut, dict)
        else cut
    )
