"""The description of a model family, and the config fields that families have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft.models.config import LayerType
from lorax_ft.models.rope import Rope, longrope_magnitude, yarn_magnitude

Fields = dict[str, Any]
"""Fields of `DecoderConfig` by name."""

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
# transformers' names -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


ROPE_TYPES = ("default", "proportional", "linear", "llama3", "yarn", "longrope")


# Keys of config.json that transformers heeds in some families and ignores in others.
OPTIONAL_KEYS = frozenset(
    {
        "attention_bias",
        "hidden_activation",
        "layer_types",
        "mlp_bias",
        "sliding_window",
        "use_bidirectional_attention",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`."""

    describe: Callable[[Any], Fields]
    """transformers' config -> the fields that differ from `describe_common`."""
    keys: frozenset[str]
    """Those of `OPTIONAL_KEYS` that transformers heeds in this family."""
    partial_rotary: bool = False
    """Whether partial_rotary_factor, the part of each head that is rotated, is heeded too."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our name of a path component -> the checkpoint's, where the two differ."""
    stacks_experts: bool = False
    """Whether a checkpoint holds the experts of a layer in one tensor, as gpt-oss's do."""


def without_ignored(hf_config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config.json without the keys that transformers ignores in the family.

    Checkpoints keep keys of the models that they were converted from.
    """
    ignored = OPTIONAL_KEYS - family.keys
    return {key: value for key, value in hf_config.items() if key not in ignored}


def rotating_whole_heads(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` without partial_rotary_factor, which transformers then ignores.

    Raises:
      ValueError: there is a scaling too, for which transformers has no code.
    """
    kept = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):  # of one type of layer
            kept[key] = rotating_whole_heads(value)
        elif key != "partial_rotary_factor":
            kept[key] = value
        elif value not in (None, 1) and parameters["rope_type"] != "default":
            raise ValueError(
                f"partial_rotary_factor {value} with rope_type {parameters['rope_type']!r}; "
                "supported in this architecture: 1"
            )
    return kept


def describe_common(c: Any) -> Fields:
    """The fields that transformers' configs have under the same names in all families.

    Raises:
      ValueError: an activation or a rotary embedding is not supported.
    """
    biases: frozenset[str] = frozenset()
    if getattr(c, "attention_bias", False):
        biases |= ATTENTION
    if getattr(c, "mlp_bias", False):
        biases |= MLP
    # Gemma 2 and 3 call it hidden_activation.
    act = getattr(c, "hidden_activation", None) or c.hidden_act
    if act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r}; supported: {', '.join(ACTIVATIONS)}")
    # With "vision", only the tokens of images see one another.
    bidirectional = getattr(c, "use_bidirectional_attention", False)
    if bidirectional and bidirectional != "vision":
        raise ValueError(f"use_bidirectional_attention {bidirectional}; supported: False")
    # transformers heeds it in all families.
    if not getattr(c, "is_causal", True):
        raise ValueError("is_causal False; supported: True")
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
    """The number of channels of a head."""
    # Older configs have no head_dim; in others it is null.
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def layer_types(c: Any) -> tuple[LayerType, ...]:
    """The attention window and rotary embedding of each layer; a single entry if all are equal."""
    window = getattr(c, "sliding_window", None)
    # Without layer_types, every layer has the window, if there is one.
    types = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    ropes = c.rope_parameters
    by_type = {}
    for attention in set(types):
        # Gemma 3 has one rotary embedding for each type of layer, other families one for all.
        rope = make_rope(ropes.get(attention, ropes), c)
        seen = window if attention == "sliding_attention" else None
        by_type[attention] = LayerType(rope=rope, window=seen)
    layers = tuple(by_type[attention] for attention in types)
    if len(set(layers)) == 1:
        return layers[:1]
    return layers


def make_rope(parameters: Mapping[str, Any], c: Any) -> Rope:
    """The rotary embedding that `rope_parameters` describe.

    Raises:
      ValueError: its rope_type is not supported.
    """
    p = dict(parameters)
    rope_type = p.get("rope_type", "default")
    # Phi-4-mini rotates only a part of each head.
    dims = int(head_dim(c) * (p.get("partial_rotary_factor") or 1))
    rope = Rope(theta=float(p["rope_theta"]), dims=dims)
    original = p.get("original_max_position_embeddings") or 0
    # Phi 3 gives no factor for longrope: it is the growth of the context.
    growth = c.max_position_embeddings / original if original else 1
    factor = float(p.get("factor") or growth)
    match rope_type:
        case "default":
            return rope
        case "linear":
            return dataclasses.replace(rope, scaling="linear", factor=factor)
        case "proportional":
            # The channels of all pairs have a place, rotated or not.
            factor = float(p.get("factor") or 1)
            rope = dataclasses.replace(rope, dims=head_dim(c), rotating_pairs=dims // 2)
            return dataclasses.replace(rope, scaling="proportional", factor=factor)
    rope = dataclasses.replace(rope, factor=factor, original_positions=original)
    match rope_type:
        case "llama3":
            low, high = p["low_freq_factor"], p["high_freq_factor"]
            return dataclasses.replace(rope, scaling="llama3", low=low, high=high)
        case "yarn":
            return _yarn(rope, p)
        case "longrope":
            return _longrope(rope, p)
    raise ValueError(f"rope_type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")


def _yarn(rope: Rope, p: Mapping[str, Any]) -> Rope:
    return dataclasses.replace(
        rope,
        scaling="yarn",
        magnitude=_yarn_attention_factor(p, rope.factor),
        low=p.get("beta_slow") or 1,
        high=p.get("beta_fast") or 32,
        rounded=p.get("truncate", True),
    )


def _longrope(rope: Rope, p: Mapping[str, Any]) -> Rope:
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = longrope_magnitude(rope.factor, rope.original_positions)
    return dataclasses.replace(
        rope,
        scaling="longrope",
        magnitude=magnitude,
        short_factors=tuple(p["short_factor"]),
        long_factors=tuple(p["long_factor"]),
    )


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    """The scale of YaRN's cosines and sines, given or computed as in transformers."""
    if p.get("attention_factor") is not None:
        return p["attention_factor"]
    # From DeepSeek's configs. Like transformers, ignore one without the other.
    above, below = p.get("mscale"), p.get("mscale_all_dim")
    if above and below:
        return yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
    return yarn_magnitude(factor)
