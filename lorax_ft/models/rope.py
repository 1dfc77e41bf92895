"""Rotary embeddings (2104.09864), and the ways their frequencies are scaled for longer texts.

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
    """How positions turn the channels of queries and keys."""

    dims: int
    """Channels that turn, the first of each head."""
    theta: float
    """The longest wavelength over 2π, before stretching."""
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    """How many times longer the texts became (linear, llama3, yarn)."""
    original_positions: int = 0
    """Positions before stretching."""
    magnitude: float = 1.0
    """Multiplies cosines and sines (yarn, longrope)."""
    low: float = 1.0
    """Turns over the original positions below which a frequency is scaled in full (llama3, yarn)."""
    high: float = 1.0
    """Turns above which it is not."""
    rounded: bool = True
    """Whether yarn rounds the two borders to whole channels."""
    short_factors: tuple[float, ...] = ()
    """By channel, for texts within the original positions (longrope)."""
    long_factors: tuple[float, ...] = ()
    """By channel, for longer texts."""


def rotary(rope: Rope, positions: Array, *, length: Array | None = None) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, dims / 2]` at positions `[B, T]`, in float32; `length` as in `frequencies`."""
    turns = frequencies(rope, positions, length=length)  # [dims / 2], or [B, dims / 2]
    turns = turns if turns.ndim == 1 else turns[:, None, None]
    angles = positions[..., None, None].astype(jnp.float32) * turns
    return rope.magnitude * jnp.cos(angles), rope.magnitude * jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Queries or keys `[B, T, H, C]`, their first channels rotated in half-split order."""
    dims = 2 * cos.shape[-1]
    turned, still = jnp.split(x, [dims], axis=-1) if dims < x.shape[-1] else (x, None)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    parts = [
        (first * cos - second * sin).astype(x.dtype),
        (second * cos + first * sin).astype(x.dtype),
    ]
    return jnp.concatenate(parts if still is None else [*parts, still], axis=-1)


def frequencies(rope: Rope, positions: Array, *, length: Array | None = None) -> Array:
    """Radians a position by pair of channels, `[dims / 2]`; longrope's, where `length` is given, `[B, dims / 2]`.

    Longrope's depend on the length of the text: `length` `[B]`, or by default the largest position. In generation it
    is what the text may grow to, so that all of the cache's keys and all queries turn alike from the start.
    """
    plain = rope.theta ** (-np.arange(0, rope.dims, 2) / rope.dims)
    if rope.scaling == "longrope":
        short, long = (
            jnp.asarray(plain / np.array(f), jnp.float32)
            for f in (rope.short_factors, rope.long_factors)
        )
        longest = jnp.max(positions) + 1 if length is None else length[:, None]
        return jnp.where(longest <= rope.original_positions, short, long)
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif (
        rope.scaling == "llama3"
    ):  # between the borders, linear in the turns over the original positions
        turns = rope.original_positions * plain / (2 * math.pi)
        kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        plain = kept * plain + (1 - kept) * plain / rope.factor
    elif rope.scaling == "yarn":  # between the borders, linear in the channel (2309.00071)
        kept = _yarn_kept(rope)
        plain = kept * plain + (1 - kept) * plain / rope.factor
    return jnp.asarray(plain, jnp.float32)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 w ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_magnitude(factor: float, original_positions: int) -> float:
    """LongRoPE's √(1 + ln factor / ln original) (2402.13753)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_positions)) if factor > 1 else 1.0


def _yarn_kept(rope: Rope) -> np.ndarray:
    """The share of each frequency that is not scaled, by pair of channels."""

    def channel(
        turns: float,
    ) -> float:  # whose wavelength makes so many turns over the original positions
        return (
            rope.dims
            * math.log(rope.original_positions / (2 * math.pi * turns))
            / (2 * math.log(rope.theta))
        )

    first, last = channel(rope.high), channel(rope.low)
    if rope.rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    return 1 - np.clip((np.arange(rope.dims // 2) - first) / max(last - first, 0.001), 0, 1)
