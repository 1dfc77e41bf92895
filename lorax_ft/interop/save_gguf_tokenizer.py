"""Tokenizers as the keys of a GGUF file, refused unless reading them back gives the same ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorax_ft.interop.end_tokens import end_of_turn
from lorax_ft.interop.gguf_tokenizer import (
    BYTE,
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    CONTROL,
    GEMMA4,
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

# Repeated spaces, digits, contractions, accents and scripts: where pre-tokenizers differ.
PROBE = "Hello  world,\n\n\tit's 1234.5 naïve 数学 кот 🦙 x_y == z   "


# Of Gemma 4's tokens, those that llama.cpp's parser of answers has to see in the text.
VISIBLE = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)


def tokenizer_metadata(model: Model, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a model's tokenizer.

    They hold the tokens and their types, merges or scores, the pre-tokenizer, the special tokens,
    the token that ends an assistant turn, and the chat templates.

    Args:
      model: has the tokenizer.
      metadata: the model's other keys.

    Raises:
      ValueError: the model has no tokenizer, or one that llama.cpp does not support.
    """
    tokenizer, source = model.tokenizer, model.source or "the model"
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(f"{source} has no tokenizer.json, which a GGUF file needs")
    special = _special_tokens(tokenizer)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    architecture = metadata["general.architecture"]
    for form in _forms(parts, model.config.vocab_size, architecture):
        keys = {f"tokenizer.ggml.{key}": value for key, value in (special | form).items()}
        keys |= _chat_templates(tokenizer.chat_template)
        again = read_tokenizer({**metadata, **keys})
        # Gemma 4's form says what llama.cpp puts before a text, whatever the tokenizer does.
        adds = form["model"] != GEMMA4
        ids, given = (t(PROBE, add_special_tokens=adds).input_ids for t in (again, tokenizer))
        if ids == given:
            return keys
    raise ValueError(
        f"the tokenizer of {source} cannot be written as GGUF; supported: SentencePiece's BPE, and "
        f"byte-level BPE as {', '.join(PRE_TOKENIZERS)}"
    )


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Returns the keys of the special tokens, and whether texts start or end with them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # An empty text shows what the tokenizer adds by itself, whichever setting makes it do so.
    added = tokenizer("").input_ids
    adds_bos = bos is not None and added[:1] == [bos]
    if adds_bos:
        added = added[1:]
    adds_eos = eos is not None and added == [eos]
    keys: dict[str, Any] = {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    for name, key in SPECIAL.items():
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None:
            keys[f"{key}_token_id"] = token_id
    end = end_of_turn(tokenizer)
    if end is not None and end != tokenizer.eos_token:
        keys["eot_token_id"] = tokenizer.convert_tokens_to_ids(end)
    return keys


def _chat_templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the keys of a chat template, or of several by name.

    llama.cpp reads the default without a name, `tool_use` for conversations with tools, and the
    list of the names; a name has letters, digits and underscores only.
    """
    if not template:
        return {}
    if isinstance(template, str):
        return {CHAT_TEMPLATE: template}
    keys: dict[str, Any] = {}
    names = []
    for name, text in template.items():
        if name == "default":
            keys[CHAT_TEMPLATE] = text
            continue
        name = re.sub(r"[^A-Za-z0-9]", "_", name)
        keys[f"{CHAT_TEMPLATE}.{name}"] = text
        names.append(name)
    if names:
        keys[CHAT_TEMPLATES] = names
    return keys


def _forms(parts: Mapping[str, Any], size: int, architecture: str) -> Iterator[dict[str, Any]]:
    """Yields the keys that might describe a tokenizer; the caller tries each.

    Args:
      parts: the contents of tokenizer.json.
      size: of the model's vocabulary, which may be larger than the tokenizer's.
      architecture: llama.cpp's name.
    """
    bpe = parts["model"]
    if bpe["type"] != "BPE":
        return
    if bpe.get("byte_fallback") and architecture == "gemma4":
        yield _gemma4(parts, size)
    elif bpe.get("byte_fallback"):
        yield from _sentencepiece(parts, size)
    else:
        yield from _byte_level(parts, size)


def _byte_level(parts: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yields a form for each of llama.cpp's names whose pre-tokenizer is the tokenizer's."""
    bpe = parts["model"]
    merges = [" ".join(pair) for pair in _pairs(bpe)]
    tokens, types = _tokens(parts, size)
    given = _without_offsets(parts["pre_tokenizer"])
    ignores_merges = bool(bpe.get("ignore_merges"))
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        known = json.loads(build_pre_tokenizer(pre_tokenizer).__getstate__())
        if _without_offsets(known) != given or pre_tokenizer.ignore_merges != ignores_merges:
            continue
        yield {
            "model": "gpt2",
            "pre": name,
            "tokens": tokens,
            "token_type": types,
            "merges": merges,
        }


def _gemma4(parts: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the form of SentencePiece's BPE with a list of merges."""
    tokens, types = _tokens(parts, size)
    for i, token in enumerate(tokens):
        if token in VISIBLE:
            types[i] = USER_DEFINED
    return {
        "model": GEMMA4,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in _pairs(parts["model"])],
        "add_space_prefix": False,
        "add_bos_token": True,
    }


def _sentencepiece(parts: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yields the forms with and without a space in front of texts."""
    tokens, types = _tokens(parts, size)
    # llama.cpp merges by score, tokenizer.json by rank: the earlier a merge, the higher the score
    # of the token that it makes. Several merges may make the same token; the first one counts.
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(parts["model"])):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for add_space_prefix in (True, False):
        yield {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "token_type": types,
            "scores": scores,
            "add_space_prefix": add_space_prefix,
        }


def _pairs(bpe: Mapping[str, Any]) -> list[list[str]]:
    """Returns the merges as pairs; tokenizers before 0.20 wrote them as strings with a space."""
    pairs = []
    for merge in bpe["merges"]:
        if isinstance(merge, str):
            merge = merge.split(" ")
        pairs.append(merge)
    return pairs


def _tokens(parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the tokens by id, and their llama.cpp types."""
    bpe = parts["model"]
    vocabulary = bpe["vocab"]
    texts = {i: token for token, i in vocabulary.items()}
    types = dict.fromkeys(texts, NORMAL)
    if bpe.get("byte_fallback"):
        for byte in range(256):
            token = f"<0x{byte:02X}>"
            if token in vocabulary:
                types[vocabulary[token]] = BYTE
    for added in parts["added_tokens"]:
        i, text = added["id"], added["content"]
        types[i], texts[i] = CONTROL, text
        if not added["special"]:
            # llama.cpp looks for these in the raw text, where spaces are still spaces.
            types[i], texts[i] = USER_DEFINED, text.replace(SPACE, " ")
    if bpe.get("unk_token") in vocabulary:
        types[vocabulary[bpe["unk_token"]]] = UNKNOWN
    # The embedding table can have more rows than there are tokens; llama.cpp's converter pads so.
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    return tokens, [types.get(i, UNUSED) for i in range(size)]


def _without_offsets(description: Any) -> Any:
    """Removes `trim_offsets` from a pre-tokenizer's JSON, since it does not affect ids."""
    if isinstance(description, list):
        return [_without_offsets(part) for part in description]
    if not isinstance(description, dict):
        return description
    kept = {}
    for key, value in description.items():
        if key != "trim_offsets":
            kept[key] = _without_offsets(value)
    return kept
