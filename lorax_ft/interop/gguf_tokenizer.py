"""Rebuild the tokenizers of GGUF files with the tokenizers package, with the same ids as llama.cpp.

llama.cpp has three that matter here. "gpt2" is byte-level BPE with a list of merges; the file names
the pre-tokenizer. "llama" is SentencePiece's BPE; the file has a score for each token, and of all
neighbors whose concatenation is a token, those with the best score are merged first. "gemma4" is
SentencePiece's BPE with a list of merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.interop.tokenizer import import_transformers

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
"""Keys of the tokens that end a text, a turn and a message, of which a file may have several."""
GEMMA4 = "gemma4"
CHAT_TEMPLATE, CHAT_TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
# llama.cpp's token types (`llama_token_type`).
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # found in texts before BPE, and never made by merges
LONGEST_TOKEN = 4096
"""Characters of a token whose merges are looked for, at all of its places."""
SPACE = "▁"  # stands for a space in SentencePiece's tokens


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level tokenizer splits texts into words, and what it does with them."""

    pattern: str | None = None
    """Regular expression that matches a word; None: GPT-2's."""
    individual_digits: bool = False
    """Whether every digit is split off first."""
    ignore_merges: bool = False
    """Whether a word that is a token becomes that token, even if the merges do not lead to it."""
    adds_bos: bool = False
    """Whether texts start with the bos token when the file has no `add_bos_token`."""


# These patterns are copied from the models' tokenizer.json files; %s marks where they differ. They
# must stay equal to the last character, since writing a file looks a tokenizer up by its pattern.
MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THREE_DIGITS = MODERN % r"\p{N}{1,3}"
ONE_DIGIT = MODERN % r"\p{N}"
# These two also split between cases, as in camel|Case.
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Of letters with their combining marks.
WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = BY_CASE % ("", "", r"\p{N}")
GPT_4O = BY_CASE % (ENDINGS, ENDINGS, r"\p{N}{1,3}")
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(individual_digits=True),
    "llama-bpe": PreTokenizer(THREE_DIGITS, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(ONE_DIGIT),
    "qwen35": PreTokenizer(WITH_MARKS),
    "smaug-bpe": PreTokenizer(THREE_DIGITS),  # SmolLM 3
    "dbrx": PreTokenizer(THREE_DIGITS),  # OLMo 2, Phi 4
    "tekken": PreTokenizer(TEKKEN, ignore_merges=True, adds_bos=True),  # Mistral Nemo
    "gpt-4o": PreTokenizer(GPT_4O),  # Phi 4 mini
    "gpt-2": PreTokenizer(),
    "olmo": PreTokenizer(),
    "deepseek-r1-qwen": PreTokenizer(ONE_DIGIT),
}
"""By llama.cpp's names.

tekken and gpt-4o have the patterns of the models themselves. llama.cpp simplifies them beyond
ASCII, so ids of texts with combining marks or accented capitals can differ from llama.cpp's there.
"""


def read_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Builds the transformers tokenizer of a file with these keys.

    Raises:
      KeyError: a key is missing.
      ValueError: the tokenizer is not supported.
    """
    algorithm = metadata["tokenizer.ggml.model"]
    pre = metadata.get("tokenizer.ggml.pre", "")
    _check_known(algorithm, pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    ids = _special_ids(metadata)
    adds_bos = True
    if algorithm == "llama":
        scores = metadata["tokenizer.ggml.scores"]
        mergeable = {token: i for i, token in enumerate(tokens) if types[i] not in WHOLE}
        add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        merges = _merges(mergeable, scores)
        tokenizer = sentencepiece(tokens, merges, tokens[ids["unk_token"]], add_prefix)
    elif algorithm == GEMMA4:
        merges = _pairs(metadata["tokenizer.ggml.merges"])
        # Gemma's texts get no space in front, whatever the file says.
        tokenizer = sentencepiece(tokens, merges, tokens[ids["unk_token"]], False)
    else:
        merges = _pairs(metadata["tokenizer.ggml.merges"])
        tokenizer = byte_level(tokens, merges, PRE_TOKENIZERS[pre])
        adds_bos = PRE_TOKENIZERS[pre].adds_bos
    tokenizer.add_tokens(_whole_tokens(tokens, types, metadata))
    special = {name: tokens[i] for name, i in ids.items()}
    # What texts start and end with.
    before, after = [], []
    # llama.cpp starts Gemma 4's texts with it whatever the file says.
    if algorithm == GEMMA4 or metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        before = [special["bos_token"]]
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [special["eos_token"]]
    _surround(tokenizer, before, after)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(metadata),
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _check_known(algorithm: str, pre: str) -> None:
    """Raises ValueError unless this module builds the tokenizer of a file."""
    # Only byte-level BPE has pre-tokenizers by name.
    is_known = algorithm == "gpt2" and pre in PRE_TOKENIZERS
    if is_known or algorithm in ("llama", GEMMA4):
        return
    known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
    raise ValueError(
        f"has the tokenizer {algorithm}/{pre}; supported: {known}, llama, {GEMMA4}; "
        "use the Hugging Face folder instead"
    )


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Returns a file's chat template, or all of them by name if it has several."""
    default = metadata.get(CHAT_TEMPLATE)
    names = metadata.get(CHAT_TEMPLATES, ())
    if not names:
        return default
    templates = {name: metadata[f"{CHAT_TEMPLATE}.{name}"] for name in names}
    if default is not None:
        # transformers' name of the one that is used where none is asked for.
        templates = {"default": default} | templates
    return templates


def byte_level(
    tokens: list[str], merges: list[tuple[str, str]], pre_tokenizer: PreTokenizer
) -> Any:
    """Builds the tokenizer that llama.cpp calls gpt2."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = build_pre_tokenizer(pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_pre_tokenizer(pre_tokenizer: PreTokenizer) -> Any:
    """Builds what splits texts into words and maps their bytes to GPT-2's printable letters."""
    from tokenizers import Regex, pre_tokenizers

    pattern = pre_tokenizer.pattern
    steps: list[Any] = []
    if pre_tokenizer.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    to_letters = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=True, use_regex=pattern is None
    )
    # `save_gguf_tokenizer` compares the structure, and a tokenizer.json has a lone step unwrapped.
    if not steps:
        return to_letters
    return pre_tokenizers.Sequence([*steps, to_letters])


def sentencepiece(
    tokens: list[str], merges: list[tuple[str, str]], unknown: str, add_prefix: bool
) -> Any:
    """Builds the tokenizers that llama.cpp calls llama and gemma4.

    Args:
      tokens: the vocabulary, by id.
      merges: pairs of tokens, the first ones merged first.
      unknown: the unk token.
      add_prefix: whether texts get a space in front.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        prepend = normalizers.Prepend(SPACE)
        tokenizer.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", SPACE)])
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids of the special tokens by transformers' names."""
    ids = {}
    # llama.cpp's defaults for SentencePiece; byte-level tokenizers have none.
    if metadata["tokenizer.ggml.model"] == "llama":
        ids = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
    for name, key in SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            ids[name] = token_id
    return ids


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    """Returns the merges of a file, "left right", as pairs."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    return pairs


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens whose concatenation is a token, the best score first."""
    # SentencePiece's files have no merges: a score decides, and of equal scores the lower id.
    ranked = []
    for token, i in vocabulary.items():
        if len(token) > LONGEST_TOKEN:
            raise ValueError(f"has a token of {len(token):,} characters")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[i], i, left, right))
    merges = []
    for _, _, left, right in sorted(ranked):
        merges.append((left, right))
    return merges


def _whole_tokens(tokens: list[str], types: list[int], metadata: Mapping[str, Any]) -> list[Any]:
    """Returns the tokens that are never split."""
    from tokenizers import AddedToken

    # Phi 3's special tokens strip the spaces behind them, except for these three. GGUF has no key
    # for that: llama.cpp goes by the model's name, and this by its architecture.
    is_phi3 = metadata["general.architecture"] == "phi3"
    strips = is_phi3 and metadata["tokenizer.ggml.model"] == "llama"
    keeps_spaces = ("<unk>", "<s>", "<|endoftext|>")
    whole = []
    for token, token_type in zip(tokens, types, strict=True):
        if token_type not in WHOLE:
            continue
        special = token_type != USER_DEFINED
        rstrip = strips and token not in keeps_spaces
        whole.append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
    return whole


def _surround(tokenizer: Any, before: list[str], after: list[str]) -> None:
    """Makes the tokenizer add tokens before and after every text."""
    from tokenizers import processors

    if not before and not after:
        return
    pieces = []
    for token in {*before, *after}:
        pieces.append((token, tokenizer.token_to_id(token)))
    # $A and $B are the texts of a pair; both start and end with the tokens.
    single = [*before, "$A", *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *before, "$B:1", *after], special_tokens=pieces
    )
