"""What a decoder is: its sizes, what its family does, and how it is computed. Imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorax_ft.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """In what layers of one decoder may differ."""

    rope: Rope | None
    """None: the layer does not know positions."""
    window: int | None = None
    """Tokens that a token sees, itself included; None sees all before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A sparse MLP (2101.03961)."""

    count: int
    top_k: int
    """Experts that a token takes."""
    renormalized: bool
    """Whether the weights of the chosen ones are scaled to the sum 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder, what its family does, and how it is computed."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    kinds: tuple[LayerKind, ...]
    """One for each layer, or one for all."""
    tied: bool
    """Whether the output head is the embedding table."""
    max_positions: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norms: Literal["before", "after", "around"] = "before"
    """Where a layer's norms stand: at the input of attention and MLP, at their output, or both."""
    norm_offset: float = 0.0
    """Added to the scale of every norm."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """Whether queries and keys are normed: each head, or all heads together."""
    biases: frozenset[str] = frozenset()
    """Names of the projections that have a bias."""
    fused: bool = False
    """Whether q, k and v, and gate and up, are one projection each."""
    experts: Experts | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Multiplies queries times keys; None: 1 / √head_dim."""
    attention_softcap: float | None = None
    """c of c · tanh(x / c), on attention scores before the mask."""
    logit_softcap: float | None = None
    """The same on the logits."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: Literal["none", "dots", "mlp", "full"] = "full"
