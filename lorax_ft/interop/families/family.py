"""What a family says, and what nearly all of them say alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft.models.config import LayerType
from lorax_ft.models.rope import Rope, longrope_magnitude, yarn_magnitude

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`."""

    describe: Callable[[Any], dict[str, Any]]
    """Fields of `DecoderConfig` by transformers' config, beside or in place of those of `describe_common`."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The checkpoint's name for a part of a path, where it is not ours."""


def describe_common(c: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig` that transformers' configs have under the same names.

    Raises:
      ValueError: an activation or a rotary embedding that is not supported.
    """
    biases = (ATTENTION if getattr(c, "attention_bias", False) else frozenset()) | (
        MLP if getattr(c, "mlp_bias", False) else frozenset()
    )
    act = getattr(c, "hidden_activation", None) or c.hidden_act
    if act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r}; supported: {', '.join(ACTIVATIONS)}")
    if getattr(c, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention True; supported: False")
    return {
        "vocab_size": c.vocab_size,
        "width": c.hidden_size,
        "mlp_width": c.intermediate_size,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": head_dim(c),
        "norm_eps": c.rms_norm_eps,
        "layer_types": layer_types(c),
        "tied": bool(c.tie_word_embeddings),
        "max_positions": c.max_position_embeddings,
        "activation": ACTIVATIONS[act],
        "biases": biases,
    }


def head_dim(c: Any) -> int:
    """Channels of a head."""
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def layer_types(c: Any) -> tuple[LayerType, ...]:
    """One type for each layer, or one for all: its attention window and its rotary embedding."""
    window = getattr(c, "sliding_window", None)
    names = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    ropes = c.rope_parameters
    by_name = {name: make_rope(ropes.get(name, ropes), c) for name in set(names)}
    types = tuple(
        LayerType(rope=by_name[name], window=window if name == "sliding_attention" else None)
        for name in names
    )
    return types if len(set(types)) > 1 else types[:1]


def make_rope(parameters: Mapping[str, Any], c: Any) -> Rope:
    """The rotary embedding that `rope_parameters` describe.

    Raises:
      ValueError: of a type that is not supported.
    """
    p = dict(parameters)
    kind = p.get("rope_type", "default")
    common: dict[str, Any] = {
        "theta": float(p["rope_theta"]),
        "dims": int(head_dim(c) * (p.get("partial_rotary_factor") or 1)),
    }
    original = p.get("original_max_position_embeddings") or 0
    factor = float(p.get("factor") or (c.max_position_embeddings / original if original else 1))
    scaled = common | {"factor": factor, "original_positions": original}
    if kind == "default":
        return Rope(**common)
    if kind == "linear":
        return Rope(**common, scaling="linear", factor=factor)
    if kind == "llama3":
        return Rope(
            **scaled, scaling="llama3", low=p["low_freq_factor"], high=p["high_freq_factor"]
        )
    magnitude = p.get("attention_factor")
    if kind == "yarn":
        if magnitude is None:
            above, below = p.get("mscale"), p.get("mscale_all_dim")
            magnitude = yarn_magnitude(factor)
            if above and below:
                magnitude = yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
        low, high = p.get("beta_slow") or 1, p.get("beta_fast") or 32
        return Rope(
            **scaled,
            scaling="yarn",
            magnitude=magnitude,
            low=low,
            high=high,
            rounded=p.get("truncate", True),
        )
    if kind == "longrope":
        return Rope(
            **scaled,
            scaling="longrope",
            magnitude=longrope_magnitude(factor, original) if magnitude is None else magnitude,
            short_factors=tuple(p["short_factor"]),
            long_factors=tuple(p["long_factor"]),
        )
    raise ValueError(f"rope_type {kind!r}; supported: default, linear, llama3, yarn, longrope")
