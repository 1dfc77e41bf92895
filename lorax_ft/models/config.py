"""The config of a decoder. This module imports no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorax_ft.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerType:
    """In what the layers of one decoder may differ."""

    # None: the layer does not encode positions.
    rope: Rope | None
    # How many tokens a token sees, itself included. None: all tokens before it.
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A sparse MLP (2101.03961)."""

    count: int
    # The number of experts for each token.
    top_k: int
    # Whether the weights of a token's experts are divided by their sum.
    renormalized: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder, the choices of its family, and how to compute it."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    # One for each layer, or one for all.
    layer_types: tuple[LayerType, ...]
    # Whether the output head is the embedding table.
    tied: bool
    max_positions: int
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    # Whether norms are at the input of attention and MLP, at their output, or at both.
    norms: Literal["before", "after", "around"] = "before"
    # Added to the scale of every norm.
    norm_offset: float = 0.0
    # Whether queries and keys are normalized, and if so each head by itself or all heads together.
    qk_norm: Literal["none", "head", "whole"] = "none"
    # The names of the projections that have a bias.
    biases: frozenset[str] = frozenset()
    # Whether q, k and v are one projection, and gate and up another.
    fused: bool = False
    # None: the MLP is dense.
    experts: Experts | None = None
    embedding_scale: float = 1.0
    # Multiplies the product of queries and keys. None: 1 / √head_dim.
    attention_scale: float | None = None
    # The c of c · tanh(x / c), on attention scores before the mask.
    attention_softcap: float | None = None
    # The same on the logits.
    logit_softcap: float | None = None
    # The dtype of the activations.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The implementation of attention.
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    # What the backward pass recomputes: nothing (none), all but dot products (dots), all but the
    # MLP's gate and up (mlp), or everything (full).
    remat: Literal["none", "dots", "mlp", "full"] = "full"
