"""Tokenizers in GGUF files, rebuilt with the tokenizers package so that they give llama.cpp's ids.

llama.cpp knows two kinds: "gpt2", byte-level BPE with its merges, cut into words by a rule that the file names; and
"llama", SentencePiece's BPE, whose file holds a score for each token: of two neighbors that make a token, those with
the best score are merged first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.interop.tokenizer import import_transformers

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # llama.cpp's types of tokens
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # never split, nor made of others
SPACE = "▁"  # SentencePiece's sign for a space


@dataclasses.dataclass(frozen=True)
class Words:
    """How texts are cut into words before their bytes are merged."""

    pattern: str | None = None
    """A regular expression; None is GPT-2's."""
    digits_apart: bool = False
    whole: bool = False
    """Whether a word that is a token is taken as it is, without merges."""
    bos: bool = False
    """Whether texts start with the token bos, where the file does not say it."""


MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS, ONE_DIGIT = MODERN % r"\p{N}{1,3}", MODERN % r"\p{N}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS = {
    "smollm": Words(digits_apart=True),
    "llama-bpe": Words(THREE_DIGITS, whole=True, bos=True),
    "qwen2": Words(ONE_DIGIT),
    "smaug-bpe": Words(THREE_DIGITS),  # SmolLM 3
    "dbrx": Words(THREE_DIGITS),  # OLMo 2, Phi 4
    "tekken": Words(BY_CASE % ("", "", r"\p{N}"), whole=True, bos=True),  # Mistral Nemo
    "gpt-4o": Words(BY_CASE % (ENDINGS, ENDINGS, r"\p{N}{1,3}")),  # Phi 4 mini
    "gpt-2": Words(),
    "olmo": Words(),
    "deepseek-r1-qwen": Words(ONE_DIGIT),
}
"""By llama.cpp's names. Those by case are the models' own, which llama.cpp simplifies beyond ASCII."""


def read_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The transformers tokenizer of a file with these keys.

    Raises:
      KeyError: a key is missing.
      ValueError: its kind is not supported.
    """
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "")
    if kind != "llama" and (kind != "gpt2" or pre not in PRE_TOKENIZERS):
        known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        raise ValueError(
            f"has the tokenizer {kind}/{pre}; supported: {known}, llama; use the Hugging Face folder instead"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    if kind == "llama":
        ids = {"bos_token": 1, "eos_token": 2, "unk_token": 0} | {
            name: i for name, i in ids.items() if i is not None
        }
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = sentencepiece(
            tokens, metadata["tokenizer.ggml.scores"], types, tokens[ids["unk_token"]], prefix
        )
    else:
        tokenizer = byte_level(tokens, metadata["tokenizer.ggml.merges"], PRE_TOKENIZERS[pre])
    tokenizer.add_tokens(_whole_tokens(tokens, types, metadata))
    named = {name: tokens[i] for name, i in ids.items() if i is not None}
    bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or PRE_TOKENIZERS[pre].bos)
    eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    _surround(tokenizer, [named["bos_token"]] if bos else [], [named["eos_token"]] if eos else [])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def byte_level(tokens: list[str], merges: list[str], words: Words) -> Any:
    """A tokenizer of the kind gpt2."""
    from tokenizers import Tokenizer, decoders, models

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=words.whole))
    tokenizer.pre_tokenizer = pre_tokenizer(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(words: Words) -> Any:
    """Cuts a text into words, and them into letters for bytes."""
    from tokenizers import Regex, pre_tokenizers

    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if words.digits_apart else []
    if words.pattern is not None:
        cuts.append(pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"))
    bytes_ = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=True, use_regex=words.pattern is None
    )
    return pre_tokenizers.Sequence([*cuts, bytes_]) if cuts else bytes_


def sentencepiece(
    tokens: list[str], scores: list[float], types: list[int], unknown: str, prefix: bool
) -> Any:
    """A tokenizer of the kind llama; `prefix` says whether a space is put before texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = _merges({token: i for token, i in vocabulary.items() if types[i] not in WHOLE}, scores)
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best score first."""
    pairs = [
        (-scores[i], i, token[:cut], token[cut:])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _whole_tokens(tokens: list[str], types: list[int], metadata: Mapping[str, Any]) -> list[Any]:
    """The tokens that are never split; Phi 3's, but for some, swallow the spaces behind them."""
    from tokenizers import AddedToken

    phi = (metadata["general.architecture"], metadata["tokenizer.ggml.model"]) == ("phi3", "llama")
    return [
        AddedToken(
            token,
            normalized=False,
            special=type_ != USER_DEFINED,
            rstrip=phi and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in WHOLE
    ]


def _surround(tokenizer: Any, before: list[str], after: list[str]) -> None:
    """Puts tokens before and behind every text."""
    from tokenizers import processors

    if not before and not after:
        return
    pieces = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    single, pair = [*before, "$A", *after], [*before, "$A", *after, *before, "$B:1", *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=pieces
    )
