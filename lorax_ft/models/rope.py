"""Rotary embeddings (2104.09864), and the ways to scale their frequencies for longer texts.

Letters: B batch, T tokens, H heads, C channels of a head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions rotate the channels of queries and keys."""

    # The number of channels that rotate: the first of each head.
    dims: int
    # The base: frequency = theta^(−channel / dims), before scaling.
    theta: float
    # How frequencies are scaled for texts longer than those of pretraining.
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope", "proportional"] = "none"
    # How many times longer the texts became (linear, llama3, yarn, proportional).
    factor: float = 1.0
    # The longest text before scaling (llama3, yarn, longrope).
    original_positions: int = 0
    # Multiplies cosines and sines (yarn, longrope).
    magnitude: float = 1.0
    # A frequency that makes fewer turns than `low` over the original positions is divided by the
    # factor, one that makes more than `high` is kept, and one between is a mixture (llama3, yarn).
    low: float = 1.0
    high: float = 1.0
    # How many pairs of channels rotate, the first ones; the others have the frequency 0
    # (proportional).
    rotating_pairs: int = 0
    # Whether yarn rounds these two borders to whole channels.
    rounded: bool = True
    # Divisors of the frequencies, for texts within the original positions and for longer ones
    # (longrope).
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def rotary(
    rope: Rope,
    positions: Array,
    *,
    length: Array | None = None,
) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, dims / 2]` at positions `[B, T]`, in float32.

    Args:
      rope: the rotary embedding.
      positions: `[B, T]`.
      length: as in `frequencies`.
    """
    radians = frequencies(rope, positions, length=length)
    if radians.ndim == 2:  # one row of frequencies for each text
        radians = radians[:, None, None]
    positions = positions[..., None, None]
    angles = positions.astype(jnp.float32) * radians
    cos = rope.magnitude * jnp.cos(angles)
    sin = rope.magnitude * jnp.sin(angles)
    return cos, sin


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Queries or keys `[B, T, H, C]` with their first channels rotated.

    A pair is channels i and i + dims / 2 (as in transformers), not two neighbors (as in the paper).
    """
    dims = 2 * cos.shape[-1]
    rest = None
    if dims < x.shape[-1]:
        x, rest = jnp.split(x, [dims], axis=-1)
    full = x.astype(jnp.float32)
    first, second = jnp.split(full, 2, axis=-1)
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    parts = [
        new_first.astype(x.dtype),
        new_second.astype(x.dtype),
    ]
    if rest is not None:
        parts.append(rest)
    return jnp.concatenate(parts, axis=-1)


def frequencies(
    rope: Rope,
    positions: Array,
    *,
    length: Array | None = None,
) -> Array:
    """Radians per position for each pair of channels, `[dims / 2]` or `[B, dims / 2]`.

    Args:
      rope: the rotary embedding.
      positions: `[B, T]`; only longrope depends on them.
      length: `[B]`, the length of each text; longrope's frequencies then are `[B, dims / 2]`. None:
        the largest position decides for all. In generation it is the length that a text may grow
        to, so that the cache's keys and all later queries use the same frequencies.
    """
    channels = np.arange(0, rope.dims, 2)
    plain = rope.theta ** (-channels / rope.dims)
    if rope.scaling == "longrope":
        return _longrope(rope, plain, positions, length)
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif rope.scaling == "proportional":
        rotates = np.arange(len(plain)) < rope.rotating_pairs
        plain = np.where(rotates, plain, 0) / rope.factor
    elif rope.scaling == "llama3":
        kept = _llama3_kept(rope, plain)
        plain = _interpolated(plain, rope.factor, kept)
    elif rope.scaling == "yarn":  # 2309.00071
        kept = _yarn_kept(rope)
        plain = _interpolated(plain, rope.factor, kept)
    return jnp.asarray(plain, jnp.float32)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 w ln(factor) + 1 (2309.00071)."""
    if factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1


def longrope_magnitude(factor: float, original_positions: int) -> float:
    """LongRoPE's √(1 + ln factor / ln original) (2402.13753)."""
    if factor <= 1:
        return 1.0
    ratio = math.log(factor) / math.log(original_positions)
    return math.sqrt(1 + ratio)


def _interpolated(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """A mixture of the plain frequencies and of those divided by the factor."""
    return kept * plain + (1 - kept) * plain / factor


def _llama3_kept(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """The share of each plain frequency: between the borders, linear in its turns."""
    turns = rope.original_positions * plain / (2 * math.pi)
    span = rope.high - rope.low
    kept = (turns - rope.low) / span
    return np.clip(kept, 0, 1)


def _yarn_kept(rope: Rope) -> np.ndarray:
    """The share of each plain frequency: between the borders, linear in its channel."""
    first = _yarn_channel(rope, rope.high)
    last = _yarn_channel(rope, rope.low)
    if rope.rounded:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, rope.dims - 1)
    span = max(last - first, 0.001)  # as in transformers, against a division by zero
    pairs = np.arange(rope.dims // 2)
    scaled = (pairs - first) / span
    return 1 - np.clip(scaled, 0, 1)


def _yarn_channel(rope: Rope, turns: float) -> float:
    """The pair of channels (a real number) that makes so many turns over the original positions."""
    inverse_frequency = rope.original_positions / (2 * math.pi * turns)
    log_base = 2 * math.log(rope.theta)
    return rope.dims * math.log(inverse_frequency) / log_base


def _longrope(
    rope: Rope,
    plain: np.ndarray,
    positions: Array,
    length: Array | None,
) -> Array:
    """Frequencies divided by the short or by the long factors, as the length says (2402.13753)."""
    short = plain / np.array(rope.short_factors)
    long = plain / np.array(rope.long_factors)
    longest = jnp.max(positions) + 1 if length is None else length[:, None]
    is_short = longest <= rope.original_positions
    return jnp.where(
        is_short,
        jnp.asarray(short, jnp.float32),
        jnp.asarray(long, jnp.float32),
    )
