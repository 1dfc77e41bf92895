"""Refuses a config.json whose sizes no computer could hold, before anything is made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lorax_ft.models.config import DecoderConfig

MOST_LAYERS = 4096
MOST_MATRICES = 200_000
"""Experts of all layers. Kimi K2 has 23,040."""
MOST_BYTES = 2**46
"""Of the weights in float32. A model of a trillion parameters takes 2^42."""
LARGEST = 2**31 - 1
"""Of any one number; JAX's integers have 32 bits."""
# transformers makes a list of that length, or asks for this many names, whatever the model is.
DIVISORS = ("num_attention_heads", "num_key_value_heads")
"""What transformers divides by."""
COUNTS = ("num_hidden_layers", "num_labels", "num_kv_shared_layers")


def check_counts(hf_config: Mapping[str, Any], source: str) -> None:
    """Raise where transformers itself would build something enormous from a config.json.

    Raises:
      ValueError: with the key and its value.
    """
    parts = [hf_config, *(part for part in hf_config.values() if isinstance(part, dict))]
    for part in parts:
        for key in DIVISORS:
            if part.get(key) == 0:
                raise ValueError(f"{source}: its config.json has {key} 0; it must be above 0")
        for key in COUNTS:
            value = part.get(key)
            if isinstance(value, int | float) and not -1 <= value <= MOST_LAYERS:
                raise ValueError(
                    f"{source}: its config.json has {key} {_short(value)}; at most {MOST_LAYERS:,} "
                    "are supported"
                )


def check_sizes(config: DecoderConfig, source: str) -> None:
    """Raise for sizes that are not whole numbers above 0, or that together are absurd.

    Raises:
      ValueError: with the size, or the bytes that the weights would take.
    """
    for name in ("vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_dim"):
        _check_whole(getattr(config, name), name, source)
    _check_whole(config.max_positions, "max_positions", source)
    for name, value in _numbers(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{source}: its config.json gives {name} {value}; it must be finite")
        if abs(value) > LARGEST and isinstance(value, int):
            raise ValueError(f"{source}: its config.json gives {name} {_short(value)}")
    _check_types(config, source)
    experts = 1
    if config.experts is not None:
        experts = config.experts.count
        _check_whole(experts, "experts", source)
        _check_whole(config.experts.top_k, "experts per token", source)
    if config.layers > MOST_LAYERS or config.layers * experts > MOST_MATRICES:
        raise ValueError(
            f"{source}: its config.json has {config.layers:,} layers with {experts:,} experts each,"
            f" more than {MOST_LAYERS:,} or {MOST_MATRICES:,} in all"
        )
    needed = _weight_bytes(config, experts)
    if needed > MOST_BYTES:
        raise ValueError(
            f"{source}: the weights that its config.json describes would take "
            f"{needed / 1e12:,.0f} TB"
        )


def _check_whole(value: Any, name: str, source: str) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 0 < value <= LARGEST:
        raise ValueError(
            f"{source}: its config.json gives {name} {_short(value)}; it must be a whole number "
            f"from 1 to {LARGEST:,}"
        )


def _check_types(config: DecoderConfig, source: str) -> None:
    """Raise where the types of layers do not fit."""
    if len(config.layer_types) not in (1, config.layers):
        raise ValueError(
            f"{source}: its config.json has {config.layers} layers, and the types of "
            f"{len(config.layer_types)}"
        )
    for layer_type in set(config.layer_types):
        if layer_type.window is not None:
            _check_whole(layer_type.window, "sliding_window", source)
        rope = layer_type.rope
        if rope is not None and (rope.theta <= 0 or rope.factor <= 0):
            raise ValueError(
                f"{source}: its config.json gives rope_theta {rope.theta} and a factor of "
                f"{rope.factor}; both must be above 0"
            )
        for part in (layer_type.linear, layer_type.heads):
            for name, value in _numbers(part):
                _check_whole(value, name, source)


def _weight_bytes(config: DecoderConfig, experts: int) -> int:
    """About how many bytes the weights take in float32: attention, MLP, table and head."""
    heads = config.heads + config.kv_heads
    attention = 2 * config.width * heads * config.head_dim
    mlp = 3 * config.width * config.mlp_width * experts
    tables = 2 * config.vocab_size * config.width
    return 4 * (config.layers * (attention + mlp) + tables)


def _numbers(part: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers in a config and in the configs inside it, by their field's name."""
    if not dataclasses.is_dataclass(part):
        return
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        items = set(value) if isinstance(value, tuple) else {value}
        for item in items:
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield field.name, item
            yield from _numbers(item)


def _short(value: Any) -> str:
    """A value for an error: large integers have thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "of more than 30 digits"
    return repr(value)[:60]
