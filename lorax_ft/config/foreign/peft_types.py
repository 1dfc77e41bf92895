"""PEFT's adapters other than LoRA, its soft prompts and its trainable tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_ft.config.document import Document
from lorax_ft.config.foreign import peft
from lorax_ft.config.foreign.peft import given
from lorax_ft.config.foreign.peft_lora import LORA
from lorax_ft.config.foreign.rules import (
    Keys,
    Kind,
    Options,
    Rule,
    Table,
    closest,
    holds,
    refused,
    same,
    shown,
    together,
    unused,
)


def feedforward(keys: Keys) -> Options:
    """IA3's modules whose input is scaled, which are targets."""
    key = "feedforward_modules"
    if not keys.given(key):
        state = keys.state(key)
        keys.note(key, f"{state}, so outputs are scaled only; PEFT chooses by the model")
        return {}
    named = peft.modules(keys, key)
    targets = keys.read("target_modules", "any", unless="adapter.targets")
    # A regular expression may be any part of another one.
    is_pattern = isinstance(keys.read(key, "any"), str) and not "".join(named).isidentifier()
    if isinstance(targets, list) and not is_pattern:
        others = sorted(set(named) - set(peft.modules(keys, "target_modules")))
        if others:
            raise keys.error(
                key,
                f"{key} must be a subset of target_modules, which lacks {shown(', '.join(others))}",
            )
    return {"adapter.feedforward": named}


def lokr_factor(keys: Keys) -> Options:
    """LoKr's factor of the sizes; -1 is none."""
    value = keys.read("decompose_factor", "whole")
    return {"adapter.lokr_factor": None if value == -1 else value}


def virtual_tokens(keys: Keys) -> Options:
    """The number of virtual tokens, for which PEFT has no default."""
    count = keys.read("num_virtual_tokens", "count")
    if count is None:
        raise keys.error(
            "num_virtual_tokens",
            "num_virtual_tokens is missing; add it, or give --prompt.virtual_tokens",
        )
    return {"prompt.virtual_tokens": count}


def prompt_start(keys: Keys) -> Options:
    """The start of a prompt; a text is used only where it is asked for, as in PEFT."""
    starts = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "TEXT": "text"}
    start = keys.choose("prompt_tuning_init", starts, "RANDOM")
    text = keys.read("prompt_tuning_init_text", "text")
    if start == "text" and not text:
        raise keys.error(
            "prompt_tuning_init",
            "prompt_tuning_init TEXT needs prompt_tuning_init_text; add it, or give --prompt.init",
        )
    if start == "text":
        return {"prompt.init": start, "prompt.text": text}
    if text is not None:
        keys.note("prompt_tuning_init_text", "not honored: it belongs to prompt_tuning_init TEXT")
    return {"prompt.init": start}


def prompt_encoder(keys: Keys) -> Options:
    """P-tuning's network; PEFT too has its layers and dropout for an LSTM alone."""
    key = "encoder_reparameterization_type"
    encoder = keys.choose(key, {"MLP": "mlp", "LSTM": "lstm"}, "MLP")
    if encoder == "lstm":
        _only("encoder_num_layers", 2, "whole", keys)
        _only("encoder_dropout", 0, "number", keys)
    return {
        "prompt.encoder": encoder,
        "prompt.encoder_width": keys.read("encoder_hidden_size", "count"),
    }


def prefix_encoder(keys: Keys) -> Options:
    """Prefix tuning's network, or none; PEFT too has its width for a network alone."""
    if not keys.read("prefix_projection", "flag", False):
        return {"prompt.encoder": "none", "prompt.init": "random"}
    return {
        "prompt.encoder": "mlp",
        "prompt.encoder_width": keys.read("encoder_hidden_size", "count"),
    }


def tokens_alone(keys: Keys) -> Options:
    """The tokens that train without an adapter."""
    names = keys.read("target_modules", "names", ())
    others = [name for name in names if name.split(".")[-1] not in ("embed_tokens", "lm_head")]
    if others:
        raise keys.error(
            "target_modules",
            f"target_modules {shown(others[0])}: tokens are in embed_tokens and lm_head",
        )
    if not keys.read("token_indices", "any"):
        state = keys.state("token_indices").replace("absent", "missing")
        raise keys.error("token_indices", f"token_indices is {state}; it is a list of ids")
    return peft.tokens(keys, "token_indices")


def _only(key: str, value: Any, kind: Kind, keys: Keys) -> None:
    """Raise where a key has another value than the one that there is here."""
    found = keys.read(key, kind, value)
    if found != value:
        raise keys.error(key, f"{key} is {found}; an LSTM here has {value}")


def _start(remark: str) -> Rule:
    return refused(remark, harmless=(True,))


def _adapter(method: str, rules: Mapping[str, Rule], *, rank: int | None = None) -> Table:
    """The keys of a type of adapter, with its default rank if it has one."""
    own = peft.kind({"adapter.method": method})
    ranks = {} if rank is None else {"r": same("adapter.rank", "whole", default=rank)}
    return {**peft.ADAPTER, "peft_type": own, "task_type": own, **ranks, **rules}


def _soft_prompt(kind: str, rules: Mapping[str, Rule]) -> Table:
    """The keys of a type of soft prompt."""
    own = peft.kind({"prompt.kind": kind, "adapter.targets": ()})
    sizes = holds("sizes are those of the model")
    return {
        **peft.SHARED,
        "peft_type": own,
        "task_type": own,
        "num_virtual_tokens": together(virtual_tokens, "prompt.virtual_tokens"),
        "token_dim": sizes,
        "num_layers": sizes,
        "num_attention_heads": sizes,
        "num_transformer_submodules": refused("models are decoders", harmless=(1,)),
        **rules,
    }


_KEPT = _start("an adapter starts such that the model is as it was")
_NO_DROPOUT = refused("there is no such dropout here", harmless=(0,))
_DRAWN = unused("what is random is drawn by train.seed")
_NO_CONVOLUTIONS = holds("there are no convolutions")
_PROMPT_START = together(prompt_start, "prompt.init", "prompt.text", remark="RANDOM: random")
_PROMPT_ENCODER = together(
    prompt_encoder, "prompt.encoder", "prompt.encoder_width", remark="MLP, or an LSTM of 2 layers"
)
_PREFIX_ENCODER = together(
    prefix_encoder,
    *("prompt.encoder", "prompt.encoder_width", "prompt.init"),
    remark="true: an MLP of encoder_hidden_size; false: none, and a random start",
)
_TOKENS = together(tokens_alone, "adapter.trainable_tokens", remark="embed_tokens, lm_head")
_ALONE = peft.kind({"adapter.targets": ()})
_BLOCKS = "blocks are given by their size, oft_block_size"
_LYCORIS: Mapping[str, Rule] = {
    "alpha": same("adapter.alpha", "number", default=8),
    "rank_pattern": given(peft.ranks, "adapter.rank_pattern"),
    "alpha_pattern": given(peft.alphas, "adapter.alpha_pattern"),
    "rank_dropout": _NO_DROPOUT,
    "module_dropout": _NO_DROPOUT,
    "use_effective_conv2d": _NO_CONVOLUTIONS,
    "init_weights": _KEPT,
}
_MISS = _adapter(
    "miss",
    {
        "miss_dropout": same("adapter.dropout", "number"),
        "mini_r": holds("it belongs to init_weights mini"),
        "init_weights": _KEPT,
    },
    rank=64,
)

TABLES: Mapping[str, Table] = {
    "LORA": LORA,
    "IA3": _adapter(
        "ia3",
        {
            "feedforward_modules": together(
                feedforward, "adapter.feedforward", remark="absent: none"
            ),
            "init_ia3_weights": _KEPT,
        },
    ),
    "MISS": _MISS,
    # What PEFT called it before version 0.19.
    "BONE": _MISS,
    "VERA": _adapter(
        "vera",
        {
            "vera_dropout": same("adapter.dropout", "number"),
            "d_initial": same("adapter.vera_d_initial", "number"),
            "projection_prng_key": _DRAWN,
            "save_projection": holds("a folder has A and B"),
            "init_weights": _KEPT,
        },
        rank=256,
    ),
    "LOHA": _adapter("loha", _LYCORIS, rank=8),
    "LOKR": _adapter(
        "lokr",
        {
            **_LYCORIS,
            "decompose_factor": given(lokr_factor, "adapter.lokr_factor", remark="-1: none"),
            "decompose_both": refused("the first factor is a whole matrix"),
            "rank_dropout_scale": holds("it belongs to rank_dropout"),
        },
        rank=8,
    ),
    "SHIRA": _adapter(
        "shira",
        {
            "mask_type": refused("the places are random", harmless=("random",)),
            "random_seed": _DRAWN,
            "init_weights": _KEPT,
        },
        rank=32,
    ),
    "HIRA": _adapter(
        "hira",
        {
            "hira_dropout": same("adapter.dropout", "number"),
            "rank_pattern": given(peft.ranks, "adapter.rank_pattern"),
            "init_weights": _KEPT,
        },
        rank=32,
    ),
    "OFT": _adapter(
        "oft",
        {
            "r": refused(_BLOCKS, harmless=(0,), instead="adapter.oft_block_size"),
            "oft_block_size": same("adapter.oft_block_size", "whole", default=32),
            "module_dropout": _NO_DROPOUT,
            "coft": refused("rotations are not constrained"),
            "eps": holds("it belongs to coft"),
            "block_share": refused("each block has a rotation of its own"),
            "use_cayley_neumann": refused("rotations are sums of 5 terms", harmless=(True,)),
            "num_cayley_neumann_terms": refused("there are 5 terms", harmless=(5,)),
            "init_weights": _KEPT,
        },
    ),
    "PROMPT_TUNING": _soft_prompt(
        "prompt",
        {
            "prompt_tuning_init": _PROMPT_START,
            "prompt_tuning_init_text": _PROMPT_START,
            "tokenizer_name_or_path": holds("the tokenizer is the model's"),
            "tokenizer_kwargs": unused("the tokenizer is the model's"),
        },
    ),
    "P_TUNING": _soft_prompt(
        "prompt",
        {
            "encoder_reparameterization_type": _PROMPT_ENCODER,
            "encoder_hidden_size": _PROMPT_ENCODER,
            "encoder_num_layers": _PROMPT_ENCODER,
            "encoder_dropout": _PROMPT_ENCODER,
        },
    ),
    "PREFIX_TUNING": _soft_prompt(
        "prefix",
        {
            "prefix_projection": _PREFIX_ENCODER,
            "encoder_hidden_size": _PREFIX_ENCODER,
            "init_weights": refused("a prefix starts at random, not at zero", harmless=()),
        },
    ),
    "TRAINABLE_TOKENS": {
        **peft.SHARED,
        "peft_type": _ALONE,
        "task_type": _ALONE,
        "token_indices": _TOKENS,
        "target_modules": _TOKENS,
        "init_weights": _KEPT,
    },
}
"""The keys of each type that is read."""
_WITHOUT_METHOD = (
    *("MULTITASK_PROMPT_TUNING", "ADALORA", "ADAMSS", "BOFT", "ADAPTION_PROMPT", "BEFT", "LILY"),
    *("POLY", "LN_TUNING", "FROD", "PVERA", "FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA"),
    *("UNILORA", "CPT", "RANDLORA", "ROAD", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA"),
    *("CARTRIDGE", "TINYLORA", "PSOFT", "PEANUT", "SHADOW", "SUPERTUNING", "DEFT"),
)
"""PEFT's other types."""


def peft_type(document: Document) -> str:
    """The type of a file.

    Raises:
      ValueError: it is none of those in `TABLES`.
    """
    keys = Keys(document)
    found = keys.read("peft_type", "text", "")
    if found.upper() in TABLES:
        return found.upper()
    known = ", ".join(TABLES)
    if not found:
        state = keys.state("peft_type") or "empty"
        raise keys.error("peft_type", f"peft_type is {state}; it must be one of {known}")
    hint = closest(found.upper(), TABLES)
    if found.upper() in _WITHOUT_METHOD:  # no other is meant
        hint = ", and no option changes that"
    raise keys.error(
        "peft_type",
        f"peft_type {shown(found)} has no method here{hint}; the types that have one are {known}",
    )
